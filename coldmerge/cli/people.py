"""`coldmerge invite`, `contributors`, `revoke`: who takes part."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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


class Role(StrEnum):
    """What an organization may do."""

    CONTRIBUTOR = "contributor"
    EVALUATOR = "evaluator"
    AUDITOR = "auditor"
    ADMIN = "admin"


organizations = typer.Typer(
    help="List organizations with their machines, or show one's contributions.",
    epilog="Example: coldmerge contributors --dir ./hub",
    invoke_without_command=True,
    rich_markup_mode="markdown",
)


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    verbs: dict[Callable[..., None], str] = {
        invite: "coldmerge invite st-mary-hospital --ttl 48h --dir ./hub",
        revoke: "coldmerge revoke st-mary-hospital --machine gpu-2 --dir ./hub",
    }
    for verb, example in verbs.items():
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(verb)
    app.add_typer(organizations, name="contributors", rich_help_panel=PANEL)


def invite(
    contributor: Annotated[str, typer.Argument(metavar="ORG", help="Name of the organization.")],
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.CONTRIBUTOR,
    ttl: Annotated[str, typer.Option(help="How long the invitation holds: 90s, 10m, 24h.")] = "24h",
    machine: Annotated[
        str,
        typer.Option(help="Only for the machine of this name; replaces its keys if they are lost."),
    ] = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Make a one-time invitation. An organization may be invited once per machine."""
    from coldmerge.rounds.policy import parse_duration
    from coldmerge.wire.v1 import admin_pb2

    request = admin_pb2.InviteRequest(
        contributor=contributor, role=role.value, ttl=parse_duration(ttl), machine=machine
    )
    with local(folder) as coordinator:
        made = ask(coordinator.admin.Invite, request)
    if fmt is Format.JSON:
        print_json(
            {
                "contributor": contributor,
                "role": role.value,
                "invitation": made.invitation,
                "fingerprint": made.fingerprint,
                "expires_at": made.expires_at.ToJsonString(),
            }
        )
        return
    err.print(
        f"An invitation for {contributor} ({role.value}), good for one machine until "
        f"{made.expires_at.ToJsonString()}. Send the first line, and tell the fingerprint by "
        "another channel (telephone, in person):",
        highlight=False,
    )
    out.print(made.invitation, highlight=False)
    out.print(f"fingerprint {made.fingerprint}", highlight=False)
    err.print(
        f"They type: coldmerge join {made.invitation[:24]}… --fingerprint {made.fingerprint}",
        highlight=False,
    )


@organizations.callback()
def contributors(
    context: typer.Context, folder: DirOption = DEFAULT_DIR, fmt: FormatOption = Format.TABLE
) -> None:
    """List organizations with their machines, or show one's contributions."""
    if context.invoked_subcommand is None:
        _list_organizations(folder, fmt)


def _list_organizations(folder: Path, fmt: Format) -> None:
    from coldmerge.wire.v1 import admin_pb2

    with local(folder) as coordinator:
        found = ask(coordinator.admin.ListContributors, admin_pb2.ListContributorsRequest())
    rows = []
    for organization in found.contributors:
        for machine in organization.machines or [admin_pb2.Machine()]:
            rows.append(
                {
                    "contributor": organization.name,
                    "role": organization.role,
                    "machine": machine.name,
                    "last_seen": when(machine, "last_seen_at"),
                    "client": machine.client_version,
                    "contributions": organization.contributions,
                    "revoked": organization.revoked or machine.revoked,
                    "reason": machine.revoked_reason or organization.revoked_reason,
                }
            )
    print_rows(rows, fmt, empty="Nobody is invited yet. Next: coldmerge invite ORG")


def revoke(
    contributor: Annotated[str, typer.Argument(metavar="ORG", help="Name of the organization.")],
    machine: Annotated[str, typer.Option(help="Only this machine of it.")] = "",
    reason: Annotated[str, typer.Option(help="Why; kept with the entry.")] = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Shut an organization, or one machine, out. What it has open ends within seconds."""
    from coldmerge.wire.v1 import admin_pb2

    with local(folder) as coordinator:
        ask(
            coordinator.admin.Revoke,
            admin_pb2.RevokeRequest(contributor=contributor, machine=machine, reason=reason),
        )
    print_record({"contributor": contributor, "machine": machine or "all", "revoked": True}, fmt)
