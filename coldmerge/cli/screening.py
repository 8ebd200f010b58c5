"""`coldmerge quarantine`, `round report`, `contributors show`: what screening found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coldmerge.cli.local import DEFAULT_DIR, PANEL, DirOption, ask, local
from coldmerge.cli.output import (
    Format,
    FormatOption,
    out,
    print_json,
    print_record,
    print_rows,
    when,
)
from coldmerge.cli.people import organizations
from coldmerge.cli.rounds import RoundArgument, short_coefficients
from coldmerge.cli.rounds import group as rounds

quarantine = typer.Typer(
    help="Decide contributions that wait.", no_args_is_help=True, rich_markup_mode="markdown"
)
ContributionArgument = Annotated[
    str, typer.Argument(metavar="CONTRIBUTION", help="Id of the contribution.")
]
ReasonOption = Annotated[str, typer.Option(help="Why; its contributor is told.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.add_typer(quarantine, name="quarantine", rich_help_panel=PANEL)


@quarantine.command("list", epilog="Example: coldmerge quarantine list --dir ./hub")
def list_waiting(
    model: Annotated[str, typer.Argument(help="Only those of this model.")] = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """List contributions to open rounds that do not count before you accept them."""
    from coldmerge.wire.v1 import screening_pb2

    request = screening_pb2.ListQuarantineRequest(model=model)
    with local(folder) as coordinator:
        found = ask(coordinator.screening.ListQuarantine, request)
    rows = [
        {
            "contribution": item.contribution.id,
            "contributor": item.contribution.contributor,
            "round": item.contribution.round,
            "norm": item.norm,
            "reference": item.reference_norm or None,
            "accepted_at": when(item.contribution, "accepted_at"),
            "reason": item.reason,
        }
        for item in found.contributions
    ]
    print_rows(rows, fmt, empty="Nothing waits.")


@quarantine.command(epilog="Example: coldmerge quarantine accept contribution-1f --dir ./hub")
def accept(
    identifier: ContributionArgument,
    reason: ReasonOption = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Let a contribution count after all; the clip still holds. Only while its round is open."""
    _decide("Accept", identifier, reason, folder, fmt)


@quarantine.command(epilog="Example: coldmerge quarantine refuse contribution-1f --reason 'copied'")
def refuse(
    identifier: ContributionArgument,
    reason: ReasonOption = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Leave a contribution out for good: its bytes are removed."""
    _decide("Refuse", identifier, reason, folder, fmt)


def _decide(method: str, identifier: str, reason: str, folder: Path, fmt: Format) -> None:
    from coldmerge.wire.v1 import contributions_pb2, screening_pb2

    request = screening_pb2.QuarantineDecision(contribution=identifier, reason=reason)
    with local(folder) as coordinator:
        found = ask(getattr(coordinator.screening, method), request)
    print_record(
        {
            "contribution": found.id,
            "contributor": found.contributor,
            "round": found.round,
            "state": contributions_pb2.Contribution.State.Name(found.state),
            "reason": found.reason or None,
        },
        fmt,
    )


@rounds.command("report", epilog="Example: coldmerge round report round-1f0c --dir ./hub")
def round_report(
    identifier: RoundArgument, folder: DirOption = DEFAULT_DIR, fmt: FormatOption = Format.TABLE
) -> None:
    """Show a round's reference norm, who was clipped, how alike the task vectors are, and hints."""
    import json

    from coldmerge.wire.v1 import screening_pb2

    request = screening_pb2.GetReportRequest(round=identifier)
    with local(folder) as coordinator:
        found = json.loads(ask(coordinator.screening.GetReport, request).report_json)
    if fmt is Format.JSON:
        print_json(found)
        return
    known = {key: found.get(key) for key in ("reference_norm", "reference_from")}
    print_record({"round": identifier, **known}, fmt)
    report = found.get("report", {})
    print_rows(_inputs(found, report), fmt, empty="No contribution yet.")
    for hint in report.get("hints", ()):
        out.print(f"[yellow]hint:[/yellow] {hint['text']}", highlight=False)


def _inputs(found: Any, report: Any) -> list[dict[str, object]]:
    merged = {item["manifest"]: item for item in report.get("inputs", ())}
    factors, stale = found.get("factors", {}), found.get("stale", {})
    learned = found.get("coefficients", {})
    rows = []
    for item in found["contributions"]:
        seen = merged.get(item["manifest"], {})
        rows.append(
            {
                "contributor": item["contributor"],
                "state": item["state"],
                "norm": item["norm"],
                "factor": factors.get(item["manifest"]),
                "discount": stale.get(item["manifest"], {}).get("discount"),
                "coefficients": short_coefficients(learned.get(item["contributor"], {})),
                "to_merged": seen.get("cosine_to_merged"),
                "to_others": seen.get("mean_cosine_to_others"),
                "reason": item["reason"],
            }
        )
    return rows


@organizations.command("show", epilog="Example: coldmerge contributors show st-mary --dir ./hub")
def show_contributor(
    contributor: Annotated[str, typer.Argument(metavar="ORG", help="Name of the organization.")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show what an organization sent, round by round, and what became of it."""
    from coldmerge.wire.v1 import screening_pb2

    request = screening_pb2.GetHistoryRequest(contributor=contributor, limit=limit)
    with local(folder) as coordinator:
        found = ask(coordinator.screening.GetHistory, request)
    rows = [
        {
            "round": entry.round,
            "state": entry.state,
            "norm": entry.norm,
            "reference": entry.reference_norm or None,
            "factor": entry.clip_factor,
            "discount": entry.discount,
            "to_merged": entry.cosine_to_merged or None,
            "isolated": entry.isolated,
            "release": entry.release_number or None,
            "reason": entry.reason or None,
        }
        for entry in found.entries
    ]
    print_rows(rows, fmt, empty=f"{contributor} has sent nothing.")
