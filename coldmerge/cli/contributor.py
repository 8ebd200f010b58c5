"""`coldmerge join`, `doctor`, `pull`, `status`, `watch`, `personal`: being a contributor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldmerge.cli.output import (
    Format,
    FormatOption,
    bars,
    err,
    out,
    print_json,
    print_record,
    print_rows,
    size,
)
from coldmerge.cli.rounds import round_row

if TYPE_CHECKING:
    from coldmerge_client.home import Home
    from coldmerge_client.session import Session

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="COLDMERGE_HOME",
        help="This contributor's folder. Default: ~/.coldmerge.",
        show_envvar=True,
    ),
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Name of the model; needed when there are several.")
]
TimeoutOption = Annotated[
    float, typer.Option(min=0, help="Seconds to keep trying while the coordinator is away.")
]
PANEL = "Contributor"

personal = typer.Typer(
    help="Use a release with your private head.", no_args_is_help=True, rich_markup_mode="markdown"
)


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    verbs: dict[Callable[..., None], str] = {
        join: "coldmerge join coldmerge-invite:… --fingerprint 3f9a…",
        doctor: "coldmerge doctor",
        renew: "coldmerge renew --new-keys",
        pull: "coldmerge pull triage",
        status: "coldmerge status --format json",
        watch: "coldmerge watch triage",
    }
    for verb, example in verbs.items():
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(verb)
    app.add_typer(personal, name="personal", rich_help_panel=PANEL)


def home_at(folder: Path | None) -> Home:
    """The home that --home, COLDMERGE_HOME or the default names."""
    from coldmerge_client.home import Home

    return Home(folder) if folder else Home.default()


@contextmanager
def session_at(folder: Path | None, timeout: float) -> Iterator[Session]:
    """An authenticated session; waiting for a coordinator that is away is said."""
    from coldmerge.core.errors import ColdmergeError, UnavailableError
    from coldmerge_client.session import Session

    def told(error: UnavailableError, wait: float) -> None:
        err.print(
            f"[yellow]{error.message}[/yellow] Trying again in {wait:.1f} s.", highlight=False
        )

    def warned(error: ColdmergeError) -> None:
        err.print(
            f"[yellow]The certificate could not be renewed yet:[/yellow] {error.message} "
            "The old one still holds; trying again in a few minutes.",
            highlight=False,
        )

    with Session.open(home_at(folder), timeout=timeout, on_retry=told) as session:
        session.on_warning = warned
        yield session


def join(
    invitation: Annotated[
        str, typer.Argument(metavar="INVITATION", help="The line from the admin, or a file of it.")
    ],
    fingerprint: Annotated[
        str, typer.Option(help="Of the federation's root certificate, told by another channel.")
    ],
    machine: Annotated[
        str | None, typer.Option(help="A name for this computer. Default: its host name.")
    ] = None,
    home: HomeOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Join a federation: keys are made here and never leave; only a request to sign them does."""
    from coldmerge_client.enrol import join as enrol

    line = invitation
    if not invitation.startswith("coldmerge-invite:") and Path(invitation).is_file():
        line = Path(invitation).read_text("utf-8").strip()
    place = home_at(home)
    member = enrol(line, fingerprint, place, machine)
    print_record(
        {
            "federation": member.federation,
            "contributor": member.contributor,
            "role": member.role,
            "machine": member.machine,
            "home": str(place.path),
        },
        fmt,
    )
    if fmt is Format.TABLE:
        out.print("Next: coldmerge doctor", highlight=False)


def doctor(
    home: HomeOption = None,
    timeout: TimeoutOption = 10.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Check everything a round needs: keys, certificate, network, disk, data, libraries."""
    from coldmerge_client.doctor import examine

    checks = []
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in examine(home_at(home), timeout=timeout):
        checks.append(asdict(check))
        if fmt is Format.TABLE:
            status = f"[{colours[check.status]}]{check.status:4}[/]"
            out.print(f"{status} {check.name}: {check.detail}", highlight=False)
            if check.hint:
                out.print(f"     {check.hint}", highlight=False)
    if fmt is Format.JSON:
        print_json(checks)
    if any(check["status"] == "fail" for check in checks):
        raise typer.Exit(1)


def renew(
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="Replace both keys; the old ones are refused then.")
    ] = False,
    home: HomeOption = None,
    timeout: TimeoutOption = 10.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Renew the certificate now; without being asked it is renewed when it must be."""
    from coldmerge_client.renewal import renew as ask
    from coldmerge_client.renewal import validity

    place = home_at(home)
    ask(place, new_keys=new_keys, patience=timeout)
    key = place.identity_key().public_key().public_bytes_raw().hex()
    print_record(
        {"valid_until": validity(place)[1].isoformat(), "new_keys": new_keys, "identity_key": key},
        fmt,
    )


def pull(
    model: ModelArgument = None,
    number: Annotated[
        int | None, typer.Option("--release", min=0, help="Which one. Default: the latest.")
    ] = None,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Bring a release here, verified; only tensors that are not here yet are fetched."""
    from coldmerge_client.pull import pull as fetch

    with session_at(home, timeout) as session:
        name = session.model(model).name
        with bars(fmt) as progress:
            pulled = fetch(session, name, number, allow_older=number is not None, progress=progress)
    print_record(
        {
            "model": name,
            "release": pulled.number,
            "digest": pulled.digest,
            "folder": str(pulled.folder),
            "downloaded": pulled.downloaded if fmt is Format.JSON else size(pulled.downloaded),
            "found_here": pulled.copied if fmt is Format.JSON else size(pulled.copied),
        },
        fmt,
    )


def status(
    home: HomeOption = None,
    timeout: TimeoutOption = 10.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show models and rounds, what is in the outbox, and everything that ever left."""
    from coldmerge_client import checkpoints, sent_log
    from coldmerge_client.outbox import Outbox

    place = home_at(home)
    with session_at(home, timeout) as session:
        checkpoint = checkpoints.refresh(session)
        models = session.models()
        newest = [(model, session.newest_round(model.name)) for model in models]
        member = session.member
        sent = [
            {"round": each.round, "state": type(each).State.Name(each.state), "reason": each.reason}
            for model, found in newest
            if found is not None and member.role != "evaluator"
            for each in session.contributions(model.name, found.id)
        ]
    rounds = [
        {
            "model": model.name,
            "latest": model.latest_number,
            "here": max(place.local_releases(model.name), default=None),
            "round": found.id if found else None,
            "state": round_row(found)["state"] if found else None,
        }
        for model, found in newest
    ]
    waiting = [
        {
            "entry": entry.id,
            "model": entry.manifest.model,
            "round": entry.manifest.round,
            "state": entry.state,
            "bytes": entry.manifest.payload_bytes,
            "reason": entry.reason,
        }
        for entry in Outbox(place).entries()
    ]
    left = [
        {"at": line.at, "what": line.event, **_summary(line.body)} for line in sent_log.read(place)
    ]
    if fmt is Format.JSON:
        who = {"contributor": member.contributor, "machine": member.machine, "role": member.role}
        size_of_log = checkpoint.size if checkpoint else None
        print_json(
            {
                **who,
                "models": rounds,
                "contributions": sent,
                "outbox": waiting,
                "left": left,
                "audit_log": size_of_log,
            }
        )
        return
    out.print(f"[bold]{member.contributor}[/bold] / {member.machine} in {member.federation}")
    out.print(
        f"Audit log: {checkpoint.size} entries, checked against the last time."
        if checkpoint
        else "[yellow]This coordinator has no audit log: it runs an older coldmerge.[/yellow]",
        highlight=False,
    )
    print_rows(rounds, fmt, empty="The federation has no model yet.")
    out.print("\n[bold]Contributions[/bold] to these rounds")
    print_rows(sent, fmt, empty="None.")
    out.print("\n[bold]Outbox[/bold]")
    print_rows(waiting, fmt, empty="Empty.")
    out.print("\n[bold]Everything that ever left[/bold] (signed, in sent.jsonl)")
    print_rows(left, fmt, empty="Nothing.")


def _summary(body: Any) -> dict[str, object]:
    return {key: body.get(key) for key in ("model", "round", "tensors", "payload_bytes", "norm")}


def watch(
    model: ModelArgument = None,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Follow a model's rounds; a line at every change, until Ctrl-C. JSON: a line per object."""
    import json

    with session_at(home, timeout) as session:
        name = session.model(model).name
        try:
            for found in session.watch_round(name):
                row = round_row(found)
                if fmt is Format.JSON:
                    typer.echo(json.dumps(row))
                    continue
                text = f"{row['round']} on release {row['base']}: [bold]{row['state']}[/bold]"
                text += f", {row['contributions']} of {row['min_contributions']} contributions"
                text += f", {row['evaluations']} evaluations"
                out.print(text + (f" ({row['reason']})" if row["reason"] else ""), highlight=False)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


@personal.command(epilog="Example: coldmerge personal export triage ./triage-for-us")
def export(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A folder to create.")],
    number: Annotated[
        int | None, typer.Option("--release", min=0, help="Which one. Default: the newest here.")
    ] = None,
    home: HomeOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Write a pulled release with your private head as one folder to use. Works offline."""
    from coldmerge.core.errors import NotFoundError
    from coldmerge_client.personal import export as write

    place = home_at(home)
    here = place.local_releases(model)
    chosen = number if number is not None else max(here, default=None)
    if chosen is None or chosen not in here:
        raise NotFoundError(
            "personal.not_pulled",
            f"Release {'' if chosen is None else chosen} of {model} is not on this machine.",
            expected=", ".join(map(str, here)) or None,
            hint=f"Fetch it: coldmerge pull {model}",
            model=model,
        )
    write(place.release(model, chosen), place.head(model), target)
    print_record({"model": model, "release": chosen, "folder": str(target)}, fmt)
