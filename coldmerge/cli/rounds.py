"""`coldmerge round`: open, follow, and steer rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from coldmerge.cli.local import DEFAULT_DIR, PANEL, DirOption, ask, local
from coldmerge.cli.output import (
    Format,
    FormatOption,
    err,
    out,
    print_json,
    print_record,
    print_rows,
    when,
)

group = typer.Typer(
    help="Open, follow and steer rounds.", no_args_is_help=True, rich_markup_mode="markdown"
)
RoundArgument = Annotated[str, typer.Argument(metavar="ROUND", help="Id of the round.")]
ReasonOption = Annotated[str, typer.Option(help="Why; kept with the round.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.add_typer(group, name="round", rich_help_panel=PANEL)


def round_row(message: Any) -> dict[str, object]:
    """A Round message as JSON-ready values."""
    from coldmerge.wire.v1 import common_pb2

    published = message.state == common_pb2.Round.PUBLISHED
    return {
        "round": message.id,
        "model": message.model,
        "state": common_pb2.Round.State.Name(message.state),
        "base": message.base_number,
        "contributions": message.contributions,
        "min_contributions": message.min_contributions,
        "evaluations": message.evaluations,
        "min_evaluators": message.min_evaluators,
        "opened_at": when(message, "opened_at"),
        "closes_at": when(message, "closes_at"),
        "held": message.held,
        "trial": message.trial,
        "left_out": message.left_out,
        "remerge": message.remerge,
        "candidate": message.candidate_digest or None,
        "release": message.release_number if published else None,
        "reason": message.reason or None,
    }


def short_round(row: Mapping[str, object]) -> dict[str, object]:
    """The columns of `round_row` that a table has room for."""
    return {
        "round": row["round"],
        "base": row["base"],
        "state": "HELD" if row["held"] else row["state"],
        "contributions": f"{row['contributions']}/{row['min_contributions']}",
        "evaluations": f"{row['evaluations']}/{row['min_evaluators']}",
        "release": row["release"],
        "reason": row["reason"],
    }


@group.command("open", epilog="Example: coldmerge round open triage --min 2 --dir ./hub")
def open_round(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    policy: Annotated[
        Path | None, typer.Option(help="A round policy in YAML. Default: the model's template.")
    ] = None,
    minimum: Annotated[
        int | None, typer.Option("--min", min=1, help="Contributions needed to merge.")
    ] = None,
    maximum: Annotated[
        int | None, typer.Option("--max", min=1, help="Seal as soon as this many are in.")
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(help="Close after this long: 10m, 24h. Without it: as soon as --min are in."),
    ] = None,
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Open a round on the latest release."""
    import json

    from coldmerge.rounds.policy import RoundPolicy, load_yaml
    from coldmerge.wire.v1 import admin_pb2
    from coldmerge_coordinator.merging.recipes import cautions

    given = load_yaml(policy).to_json() if policy else {}
    options = {"min_contributions": minimum, "max_contributions": maximum, "duration": duration}
    given |= {key: value for key, value in options.items() if value is not None}
    with local(folder) as coordinator:
        opened = ask(
            coordinator.admin.OpenRound,
            admin_pb2.OpenRoundRequest(model=model, policy_json=json.dumps(given)),
        )
    merge = RoundPolicy.model_validate_json(opened.policy_json).merge
    for caution in cautions(merge):
        err.print(f"[yellow]note:[/yellow] {caution}", highlight=False)
    if fmt is Format.TABLE:
        note_small_cohort(opened.min_contributions)
    print_record(round_row(opened), fmt)


def note_small_cohort(count: int) -> None:
    """Say what a round of so few shows."""
    if count < 3:
        out.print(
            f"[yellow]note:[/yellow] a round of {count} lets a contributor compute the others' "
            "task vector from the release; 3 or more hide it in a sum.",
            highlight=False,
        )


@group.command("list", epilog="Example: coldmerge round list triage --dir ./hub")
def list_rounds(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """List a model's rounds, newest first."""
    from coldmerge.wire.v1 import rounds_pb2

    with local(folder) as coordinator:
        found = ask(coordinator.rounds.List, rounds_pb2.ListRoundsRequest(model=model, limit=limit))
    rows = [round_row(message) for message in found.rounds]
    if fmt is Format.TABLE:
        rows = [short_round(row) for row in rows]
    print_rows(rows, fmt, empty=f"No round yet. Next: coldmerge round open {model}")


@group.command(epilog="Example: coldmerge round show round-1f0c --dir ./hub --format json")
def show(
    identifier: RoundArgument, folder: DirOption = DEFAULT_DIR, fmt: FormatOption = Format.TABLE
) -> None:
    """Show a round: its policy, and what it admitted from whom, how large, with which norm."""
    import json

    from coldmerge.wire.v1 import admin_pb2, rounds_pb2

    with local(folder) as coordinator:
        message = ask(coordinator.rounds.Get, rounds_pb2.GetRoundRequest(id=identifier))
        admitted = ask(
            coordinator.admin.ListRoundContributions, admin_pb2.RoundAction(round=identifier)
        )
    contributions = [
        {
            "contributor": item.contributor,
            "state": item.state,
            "bytes": item.payload_bytes,
            "norm": item.norm,
            "examples": item.examples,
            "base": item.base_number,
            "discount": item.discount,
            "coefficients": dict(item.coefficients),
            "accepted_at": item.accepted_at.ToJsonString(),
            "manifest": item.manifest_digest,
            "reason": item.reason or None,
        }
        for item in admitted.contributions
    ]
    trials = [
        {
            "trial": trial.number,
            "left_out": trial.left_out,
            "passed": trial.passed,
            "reason": trial.reason,
        }
        for trial in message.trials
    ]
    policy = json.loads(message.policy_json)
    if fmt is Format.JSON:
        row = round_row(message)
        measured = [{**one, "point": point} for one, point in probe_rows(message)]
        lists = {"admitted": contributions, "trials": trials, "probes": measured}
        print_json({**row, "policy": policy, **lists})
        return
    print_record(round_row(message), fmt)
    out.print("\n[bold]policy[/bold]", json.dumps(policy), highlight=False)
    short = [
        {**one, "coefficients": short_coefficients(one["coefficients"])} for one in contributions
    ]
    print_rows(short, fmt, empty="Nothing admitted yet.")
    if message.probes:
        out.print("\n[bold]probes for coefficients[/bold]")
        print_rows([one for one, _ in probe_rows(message)], fmt, empty="")
    if trials:
        out.print("\n[bold]the search for a bad update[/bold]")
        print_rows(trials, fmt, empty="")


def probe_rows(message: Any) -> list[tuple[dict[str, object], list[float]]]:
    """The probes of a Round message as columns of a table, each with its point."""
    return [
        (
            {"probe": one.number, "evaluators": one.evaluators, "value": round(one.value, 6)},
            list(one.point),
        )
        for one in message.probes
    ]


def short_coefficients(learned: Any) -> str | None:
    """The coefficient of a contribution, or how far those of its layers lie apart."""
    found = sorted(learned.values())
    if not found:
        return None
    return f"{found[0]:g}" if found[0] == found[-1] else f"{found[0]:g} to {found[-1]:g}"


def _act(method: str, request: Any, folder: Path, fmt: Format) -> None:
    with local(folder) as coordinator:
        message = ask(getattr(coordinator.admin, method), request)
    print_record(round_row(message), fmt)


@group.command(epilog="Example: coldmerge round seal round-1f0c --dir ./hub")
def seal(
    identifier: RoundArgument, folder: DirOption = DEFAULT_DIR, fmt: FormatOption = Format.TABLE
) -> None:
    """Close admissions now and merge what is there."""
    from coldmerge.wire.v1 import admin_pb2

    _act("SealRound", admin_pb2.RoundAction(round=identifier), folder, fmt)


@group.command(epilog="Example: coldmerge round abandon round-1f0c --reason 'wrong base'")
def abandon(
    identifier: RoundArgument,
    reason: ReasonOption = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """End a round without a release."""
    from coldmerge.wire.v1 import admin_pb2

    _act("AbandonRound", admin_pb2.RoundAction(round=identifier, reason=reason), folder, fmt)


@group.command(epilog="Example: coldmerge round extend round-1f0c --by 2h --dir ./hub")
def extend(
    identifier: RoundArgument,
    by: Annotated[str, typer.Option(help="How much longer: 30m, 2h, 1d.")],
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Move the deadline the round is waiting for: admission, or evaluation."""
    from coldmerge.rounds.policy import parse_duration
    from coldmerge.wire.v1 import admin_pb2

    request = admin_pb2.ExtendRoundRequest(round=identifier, by=parse_duration(by))
    _act("ExtendRound", request, folder, fmt)


@group.command(epilog="Example: coldmerge round resolve round-1f0c --reject --reason 'one ward'")
def resolve(
    identifier: RoundArgument,
    publish: Annotated[
        bool, typer.Option("--publish/--reject", help="What becomes of the candidate.")
    ],
    reason: ReasonOption = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Decide a candidate the gate holds, because too few evaluated it in time."""
    from coldmerge.wire.v1 import admin_pb2

    request = admin_pb2.ResolveRoundRequest(round=identifier, publish=publish, reason=reason)
    _act("ResolveRound", request, folder, fmt)


@group.command(epilog="Example: coldmerge round remerge triage --without st-mary --reason left")
def remerge(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    without: Annotated[
        list[str],
        typer.Option(help="An organization, or the id of a contribution. Repeatable."),
    ],
    reason: ReasonOption = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Make the latest release again without some updates, and ask the gate about it.

    The updates are removed, not unlearned: later ones were trained on releases that held them.
    """
    from coldmerge.wire.v1 import admin_pb2

    request = admin_pb2.RemergeRequest(model=model, without=without, reason=reason)
    _act("Remerge", request, folder, fmt)
    err.print(
        "[yellow]note:[/yellow] where one contribution of a round is removed, whoever kept the "
        "releases can compute it from the difference.",
        highlight=False,
    )
