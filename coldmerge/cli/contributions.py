"""`coldmerge train`, `push`, `withdraw`, `evaluate`, `contribute`: taking part in rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldmerge.cli.contributor import (
    PANEL,
    HomeOption,
    ModelArgument,
    TimeoutOption,
    session_at,
)
from coldmerge.cli.leaving import ask_whether, print_leaving, print_stale
from coldmerge.cli.output import (
    Format,
    FormatOption,
    bars,
    err,
    out,
    print_json,
    print_record,
)

if TYPE_CHECKING:
    from coldmerge_client.home import Home
    from coldmerge_client.policy import SendPolicy
    from coldmerge_client.training import TrainConfig

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Training configuration in YAML; kept for the next time."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder or file of private data; kept, too.")
]
ApprovalOption = Annotated[
    bool, typer.Option("--require-approval", help="Ask a person before anything leaves.")
]


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    verbs: dict[Callable[..., None], str] = {
        train: "coldmerge train triage --data ./notes",
        push: "coldmerge push triage --dry-run",
        withdraw: "coldmerge withdraw triage",
        evaluate: "coldmerge evaluate triage",
        contribute: "coldmerge contribute triage --data ./notes --rounds 2",
    }
    for verb, example in verbs.items():
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(verb)


def configured(home: Home, model: str, config: Path | None, data: Path | None) -> TrainConfig:
    """The model's training configuration: given now, or kept from the last time.

    Raises:
        ConfigError: none was ever given, or it is wrong.
    """
    import yaml

    from coldmerge.core.errors import ConfigError
    from coldmerge_client.training import TrainConfig

    kept = home.config(model)
    if config is None and data is None and not kept.is_file():
        raise ConfigError(
            "training.nothing_to_train_on",
            f"It was never said what {model} trains on here.",
            expected="--data FOLDER, or --config FILE",
            hint="Give a folder with train.jsonl and validation.jsonl: --data ./notes",
            model=model,
        )
    source = config or (kept if kept.is_file() else None)
    given = TrainConfig.load(source).model_dump(mode="json") if source else {}
    if data is not None:
        given["data"] = {**given.get("data", {}), "train": str(data.resolve())}
        given["data"].pop("validation", None)
    chosen = TrainConfig.parse(given)
    if config is not None or data is not None:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept.write_text(yaml.safe_dump(chosen.model_dump(mode="json", exclude_defaults=True)))
    return chosen


def train(
    model: ModelArgument = None,
    data: DataOption = None,
    config: ConfigOption = None,
    number: Annotated[
        int | None, typer.Option("--release", min=0, help="Which one. Default: the open round's.")
    ] = None,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Pull a release and fine-tune it here. Run again after a crash: it resumes."""
    from coldmerge_client.prepare import asked_of
    from coldmerge_client.pull import pull
    from coldmerge_client.train import train as fit

    with session_at(home, timeout) as session:
        name = session.model(model).name
        settings = configured(session.home, name, config, data)
        with bars(fmt) as progress:
            base = pull(session, name, number, allow_older=number is not None, progress=progress)
        asked = asked_of(session, base)
    with bars(fmt) as progress:
        trained = fit(session.home, base, settings, statistics=asked, progress=progress)
    print_record(
        {
            "model": name,
            "release": base.number,
            "examples": trained.examples,
            **trained.metrics,
            "folder": str(trained.folder),
        },
        fmt,
    )
    if fmt is Format.TABLE:
        out.print(f"Next: coldmerge push {name} --dry-run", highlight=False)


def push(
    model: ModelArgument = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A fine-tune that exists: an HF folder or a PEFT adapter."),
    ] = None,
    base: Annotated[
        int | None, typer.Option("--base", min=0, help="The release it was fine-tuned from.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Training examples behind --from; a weight, if asked for.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say exactly what would leave; send nothing.")
    ] = False,
    require_approval: ApprovalOption = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Half the bytes, slightly rounded.")] = False,
    home: HomeOption = None,
    timeout: TimeoutOption = 300.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Ship the fine-tune to the open round. Run again after a crash: it goes on."""
    from coldmerge_client.bases import base_of, open_round, staleness
    from coldmerge_client.outbox import Outbox
    from coldmerge_client.prepare import against_policy, describe, merge_of, prepare, preview
    from coldmerge_client.push import send

    with session_at(home, timeout) as session:
        name = session.model(model).name
        policy = _policy(session.home, require_approval, bf16)
        found = open_round(session, name, base)
        entry = Outbox(session.home).for_round(found.id)
        if entry is not None and against_policy(entry.manifest, policy) is not None:
            entry = None
        with bars(fmt) as progress:
            if entry is None or source is not None or not entry.pending:
                chosen = _base(session.home, found, base, source)
                release = base_of(session, found, progress, number=chosen)
                tuned, facts = _tuned(session.home, release, source, examples)
                if dry_run:
                    leaving = preview(
                        session,
                        release,
                        tuned,
                        facts,
                        policy=policy,
                        merge=merge_of(found),
                        progress=progress,
                    )
                    print_leaving(leaving, fmt, sent=False)
                    print_stale(staleness(found, leaving.base_number))
                    return
                entry = prepare(
                    session, found, tuned, facts, base=chosen, policy=policy, progress=progress
                )
            elif dry_run:
                print_leaving(describe(entry), fmt, sent=False)
                print_stale(staleness(found, entry.manifest.base_number))
                return
        print_stale(staleness(found, entry.manifest.base_number))
        if policy.require_approval and not entry.approved and ask_whether(describe(entry)):
            entry = Outbox(session.home).mark(entry, approved=True)
        with bars(fmt) as progress:
            entry = send(session, entry, policy=policy, progress=progress)
        standing = session.contribution(entry.receipt.contribution) if entry.receipt else None
    print_leaving(describe(entry), fmt, sent=True)
    if standing is not None and standing.reason:
        state = type(standing).State.Name(standing.state)
        err.print(f"[yellow]{state}:[/yellow] {standing.reason}", highlight=False)


def _base(home: Home, round_: Any, base: int | None, source: Path | None) -> int:
    """The release the fine-tune is of: as given, or the newest of which one is here, unsent."""
    from coldmerge_client.bases import unsent
    from coldmerge_client.train import finished_at

    if base is not None:
        return base
    newest: int = round_.base_number
    if source is not None or finished_at(home, round_.model, round_.base_digest) is not None:
        return newest
    older = unsent(home, round_)
    return newest if older is None else older


def _tuned(home: Home, release: Any, source: Path | None, examples: int) -> tuple[Path, Any]:
    from coldmerge.core.errors import NotFoundError
    from coldmerge_client.prepare import Facts
    from coldmerge_client.train import finished

    if source is not None:
        return source, Facts(examples=examples)
    trained = finished(home, release)
    if trained is None:
        raise NotFoundError(
            "push.nothing_trained",
            f"There is no fine-tune of release {release.number} of {release.model} here.",
            hint=f"coldmerge train {release.model}, or push --from FOLDER --base {release.number}",
            model=release.model,
        )
    return trained.folder, Facts(trained.examples, trained.metrics, trained.training)


def _policy(home: Home, require_approval: bool, bf16: bool) -> SendPolicy:
    from coldmerge_client.policy import SendPolicy

    return SendPolicy.load(home.policy).narrowed(
        require_approval=require_approval, encoding="bf16" if bf16 else None
    )


def withdraw(
    model: ModelArgument = None,
    contribution: Annotated[
        str | None,
        typer.Option(help="One of an ended round, by its id. Default: that of the open round."),
    ] = None,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Take a contribution back: the coordinator erases its bytes, and merges it no more."""
    from coldmerge_client.withdraw import withdraw as take_back

    with session_at(home, timeout) as session:
        taken = take_back(session, session.model(model).name, contribution)
    said = {"reason": taken.reason} if taken.reason else {}
    print_record(
        {"model": taken.model, "round": taken.round, "contribution": taken.id, **said}, fmt
    )


def evaluate(
    model: ModelArgument = None,
    data: DataOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scores; report nothing.")
    ] = False,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Compare the candidate with its base on your validation data, and report the counts."""
    from coldmerge.core.errors import NotFoundError
    from coldmerge_client.evaluate import evaluate as judge
    from coldmerge_client.evaluate import report

    with session_at(home, timeout) as session:
        name = session.model(model).name
        settings = configured(session.home, name, config, data)
        found = session.newest_round(name)
        if found is None:
            raise NotFoundError(
                "evaluate.no_round",
                f"There is no round of {name} yet.",
                hint="Follow it with `coldmerge watch`.",
                model=name,
            )
        with bars(fmt) as progress:
            scores = judge(session, found, settings, progress=progress)
        if not dry_run:
            report(session, found, scores)
    print_record(
        {
            "round": found.id,
            "items": scores.n,
            "base_accuracy": scores.base.accuracy,
            "candidate_accuracy": scores.candidate.accuracy,
            "base_macro_f1": scores.base.macro_f1,
            "candidate_macro_f1": scores.candidate.macro_f1,
            "only_candidate_right": scores.gained,
            "only_base_right": scores.lost,
            "reported": not dry_run,
        },
        fmt,
    )


def contribute(
    model: ModelArgument = None,
    data: DataOption = None,
    config: ConfigOption = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many. Default: go on for ever.")
    ] = None,
    require_approval: ApprovalOption = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Half the bytes, slightly rounded.")] = False,
    home: HomeOption = None,
    timeout: TimeoutOption = 600.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Pull, train, push, wait, evaluate, and again. Run again after a crash: it goes on."""
    from coldmerge.cli.rounds import round_row
    from coldmerge_client.contribute import Terms
    from coldmerge_client.contribute import contribute as take_part

    with session_at(home, timeout) as session:
        name = session.model(model).name
        settings = configured(session.home, name, config, data)
        ended = []
        with bars(fmt) as progress:
            terms = Terms(
                settings,
                _policy(session.home, require_approval, bf16),
                approve=ask_whether,
                progress=progress,
                tell=lambda step: err.print(step.text, highlight=False),
            )
            for found in take_part(session, name, terms, rounds=rounds):
                row = round_row(found)
                ended.append(row)
                err.print(
                    f"[bold]{row['round']} {row['state']}[/bold]: {row['reason']}", highlight=False
                )
    if fmt is Format.JSON:
        print_json(ended)
    else:
        out.print(f"Took part in {len(ended)} rounds of {name}.", highlight=False)
