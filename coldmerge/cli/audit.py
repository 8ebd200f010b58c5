"""`coldmerge audit` and `coldmerge receipt`: the evidence, and checking it offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coldmerge.cli.contributor import HomeOption, TimeoutOption, home_at, session_at
from coldmerge.cli.local import coordinator_folder
from coldmerge.cli.output import Format, FormatOption, out, print_record, print_rows

if TYPE_CHECKING:
    from coldmerge.core.audit_file import AuditFile
    from coldmerge.core.audit_log import Checked
    from coldmerge.core.documents import Signed
    from coldmerge_coordinator.store import Store

group = typer.Typer(
    help="Read, export and verify the audit log.", no_args_is_help=True, rich_markup_mode="markdown"
)
receipt = typer.Typer(
    help="Check the receipts that a contributor keeps.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
PANEL = "Evidence"

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--dir", help="A coordinator's folder, served or not. Default: ask over the network."
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(help="A contributor's home (or its state.json): the log must extend what it saw."),
]


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.add_typer(group, name="audit", rich_help_panel=PANEL)
    app.add_typer(receipt, name="receipt", rich_help_panel=PANEL)


@contextmanager
def _stored(folder: Path) -> Iterator[Store]:
    from coldmerge_coordinator.store import Store

    with Store.open(coordinator_folder(folder)) as store:
        yield store


def _log(folder: Path | None, home: Path | None, timeout: float) -> AuditFile:
    """The log of a folder, or of the coordinator that a home belongs to."""
    if folder is not None:
        from coldmerge.core.clock import SystemClock
        from coldmerge_coordinator.audit.export import export as made

        with _stored(folder) as store:
            return made(store, SystemClock().now())
    from coldmerge_client.evidence import download

    with session_at(home, timeout) as session:
        return download(session)


@group.command(epilog="Example: coldmerge audit show --dir ./hub --kind upload.refused")
def show(
    folder: FolderOption = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind, such as round.sealed.")] = None,
    about: Annotated[
        str | None, typer.Option(help="Only entries that name this: a contributor, a round, …")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 50,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show the log's entries. Over the network: for an auditor or admin."""
    from coldmerge.core.audit_log import kind_of, read_leaf, time_of

    rows: list[dict[str, object]] = []
    for position, raw in enumerate(_log(folder, home, timeout).entries):
        leaf = read_leaf(raw)
        body = leaf.model_dump(mode="json")
        if (kind and kind_of(leaf) != kind) or (about and about not in _names(body)):
            continue
        ids, detail = body.get("ids"), body.get("detail")
        rows.append(
            {
                "position": position,
                "at": time_of(leaf).isoformat(),
                "kind": kind_of(leaf),
                "actor": body.get("actor") or body.get("contributor") or "coordinator",
                "ids": ids if ids is not None else _own_ids(body),
                "detail": detail if detail is not None else {},
            }
        )
    shown = rows[-limit:]
    if fmt is Format.TABLE:
        for row in shown:
            for key in ("ids", "detail"):
                row[key] = _pairs(row[key])
    print_rows(shown, fmt, empty="No such entry.")


def _names(body: dict[str, object]) -> set[object]:
    ids = body.get("ids")
    inner = ids.values() if isinstance(ids, dict) else ()
    return {body.get("actor"), *inner, *(value for value in body.values() if type(value) is str)}


def _own_ids(body: dict[str, object]) -> dict[str, object]:
    names = ("model", "number", "round", "contributor", "contribution")
    return {name: body[name] for name in names if body.get(name) is not None}


def _pairs(values: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else ""


@group.command(epilog="Example: coldmerge audit export ./evidence --dir ./hub")
def export(
    target: Annotated[Path, typer.Argument(help="A file, or a folder for audit.jsonl.")],
    folder: FolderOption = None,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Write the whole log, its checkpoints and keys to one file that verifies offline."""
    from coldmerge.core.audit_file import FILE_NAME

    log = _log(folder, home, timeout)
    path = target / FILE_NAME if target.is_dir() else target
    log.write(path)
    print_record({"entries": len(log.entries), "file": str(path)}, fmt)


@group.command(epilog="Example: coldmerge audit verify audit.jsonl --checkpoint ~/.coldmerge")
def verify(
    file: Annotated[Path | None, typer.Argument(help="An exported log.")] = None,
    folder: FolderOption = None,
    checkpoint: CheckpointOption = None,
    key: Annotated[
        str | None, typer.Option(help="The federation's signing key, 64 hexadecimal digits.")
    ] = None,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Verify a log: an exported FILE, a folder (--dir), or the coordinator's, over the network.

    Every entry, every checkpoint's root and signature, and every record's chain. Exits 10
    on the first difference and names its position.
    """
    from coldmerge.core.audit_file import read_audit_file

    kept, known = _kept(checkpoint)
    if key is not None:
        known = _key(key)
    if file is not None:
        checked = read_audit_file(file).check(known, *kept)
    elif folder is not None:
        from coldmerge_coordinator.audit.export import check_stored

        with _stored(folder) as store:
            checked = check_stored(store, *kept)
    else:
        checked = _log(None, home, timeout).check(known, *kept)
    _report(checked, pinned=bool(known) or file is None, fmt=fmt)


def _report(checked: Checked, *, pinned: bool, fmt: Format) -> None:
    print_record(
        {
            "federation": checked.federation,
            "entries": checked.size,
            "root": checked.root,
            "checkpoints": checked.checkpoints,
            "unsigned": checked.unsigned,
            "turned_back": checked.turned_back,
            "releases": {name: one.number for name, one in checked.releases.items()},
        },
        fmt,
    )
    if fmt is Format.TABLE:
        out.print("The log is whole: every entry, root and signature fits.", highlight=False)
        if not pinned:
            out.print(
                "[yellow]The key is the file's own: pass --key or --checkpoint to be sure "
                "whose log this is.[/yellow]"
            )


def _kept(place: Path | None) -> tuple[list[Signed], str | None]:
    """The checkpoint that a home keeps, and the signing key that it knows."""
    if place is None:
        return [], None
    from coldmerge.core.errors import ConfigError

    home = home_at(place if place.is_dir() else place.parent)
    signed = home.checkpoint()
    if signed is None:
        raise ConfigError(
            "audit.no_checkpoint",
            f"{home.path} keeps no checkpoint of an audit log.",
            hint="A home gets one with its first `coldmerge pull` or `coldmerge status`.",
        )
    return [signed], home.membership().signing_key


def _key(text: str) -> str:
    from coldmerge.core.errors import ConfigError

    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ConfigError(
            "audit.bad_key",
            "The signing key cannot be read.",
            expected="64 hexadecimal digits",
            got=text[:80],
            hint="It is `signing_key` in federation.json of a contributor's home.",
        )
    return raw.hex()


@receipt.command("verify", epilog="Example: coldmerge receipt verify --all --log audit.jsonl")
def verify_receipt(
    file: Annotated[Path | None, typer.Argument(help="A receipt.json.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All receipts of this home.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="An exported log that must hold them. Works offline.")
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Have the coordinator prove that its log holds them.")
    ] = False,
    home: HomeOption = None,
    timeout: TimeoutOption = 60.0,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Check receipts against the coordinator's key, and against the log. Exits 10 if one fails."""
    from coldmerge_client.evidence import check_receipt, prove_receipt

    place = home_at(home)
    receipts = _receipts(place.outbox, file, every=every)
    found = []
    if online:
        from coldmerge_client import checkpoints

        with session_at(home, timeout) as session:
            head = checkpoints.refresh(session)
            for signed in receipts:
                checked = prove_receipt(session, head, signed) if head else None
                found.append(checked or check_receipt(place, signed))
    else:
        exported = None if log is None else _checked_log(log, place.path)
        found = [check_receipt(place, signed, exported) for signed in receipts]
    rows = [
        {
            "contribution": one.receipt.contribution,
            "round": one.receipt.round,
            "accepted_at": one.receipt.accepted_at.isoformat(),
            "signature": "good",
            "position": one.position,
        }
        for one in found
    ]
    print_rows(rows, fmt, empty="No receipt is kept here.")


def _checked_log(path: Path, home: Path) -> AuditFile:
    from coldmerge.core.audit_file import read_audit_file

    log = read_audit_file(path)
    log.check(home_at(home).membership().signing_key)
    return log


def _receipts(outbox: Path, file: Path | None, *, every: bool) -> list[Signed]:
    from coldmerge.core.documents import Signed
    from coldmerge.core.errors import ConfigError

    if (file is None) == (not every):
        raise ConfigError(
            "receipt.which",
            "Say which receipt to check.",
            expected="a receipt.json, or --all",
            hint="Receipts are below outbox/ in the home folder.",
        )
    paths = [file] if file is not None else sorted(outbox.glob("*/receipt.json"))
    return [Signed(path.read_bytes(), path.with_suffix(".sig").read_bytes()) for path in paths]
