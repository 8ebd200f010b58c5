"""What an admin may do, as functions on the store; `admin_service` puts them on the wire."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, select, true
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConfigError, ConflictError, NotFoundError
from coldmerge.core.ids import IDENTIFIER_RULE, is_identifier
from coldmerge.rounds import state
from coldmerge.rounds.policy import parse_template
from coldmerge.rounds.state import Event
from coldmerge.wire.invitation import token_digest
from coldmerge_coordinator import audit
from coldmerge_coordinator.actors import LOCAL_ADMIN
from coldmerge_coordinator.auth import ROLES
from coldmerge_coordinator.store import (
    Store,
    contribution_log,
    contributions,
    people,
    releases,
    remerges,
    rounds,
)
from coldmerge_coordinator.store.models import Contributor, Invitation, Machine, Release, Round

SHORTEST_TTL = timedelta(seconds=1)
LONGEST_TTL = timedelta(days=30)


@dataclass(frozen=True)
class Invited:
    """The token, which is kept nowhere else, and until when it holds."""

    token: str
    expires_at: datetime


def invite(
    store: Store,
    contributor: str,
    role: str,
    ttl: timedelta,
    now: datetime,
    *,
    machine: str = "",
    actor: str = LOCAL_ADMIN,
) -> Invited:
    """A one-time token for a machine of an organization, which is made if it is new.

    Inviting an organization that was revoked lets it back in: with new machines only. An
    invitation for one `machine` by its name replaces the keys that it is enrolled with.

    Raises:
        ConfigError: a bad name, role or lifetime.
        ConflictError: the organization has another role.
    """
    _check_invitation(contributor, role, ttl, machine)
    token = secrets.token_urlsafe(32)
    invitation = Invitation(
        token_sha256=token_digest(token).hex(),
        contributor=contributor,
        role=role,
        created_at=now,
        expires_at=now + ttl,
        machine=machine or None,
    )
    with store.database.write() as session:
        row = people.hold(session, contributor) or people.make(session, contributor, role, now)
        _let_back_in(session, row, role)
        session.add(invitation)
        _log_invitation(session, invitation, actor)
    return Invited(token, invitation.expires_at)


def _let_back_in(session: Session, row: Contributor, role: str) -> None:
    """End the revocation of an organization of that role; its machines stay shut out."""
    if row.role != role:
        raise ConflictError(
            "invite.other_role",
            f"{row.name} takes part in another role.",
            expected=row.role,
            got=role,
            hint=f"Invite it with --role {row.role}, or another name for the other role.",
            contributor=row.name,
        )
    if row.revoked_at is not None:
        for machine in machines_of(session, row.name):
            machine.revoked_at = machine.revoked_at or row.revoked_at
        row.revoked_at, row.revoked_reason = None, None


def _log_invitation(session: Session, invitation: Invitation, actor: str) -> None:
    ids = {"contributor": invitation.contributor, "invitation": invitation.token_sha256[:16]}
    if invitation.machine:
        ids["machine"] = invitation.machine
    until = invitation.expires_at.isoformat()
    detail: dict[str, audit.Scalar] = {"role": invitation.role, "expires_at": until}
    audit.append(
        session, "contributor.invited", actor, invitation.created_at, ids=ids, detail=detail
    )


def _check_invitation(contributor: str, role: str, ttl: timedelta, machine: str) -> None:
    if machine and not is_identifier(machine):
        raise ConfigError(
            "invite.bad_machine_name",
            "A machine cannot have that name.",
            expected=IDENTIFIER_RULE,
            got=repr(machine[:80]),
            hint="List machines with `coldmerge contributors`.",
        )
    if not is_identifier(contributor):
        raise ConfigError(
            "invite.bad_name",
            "An organization cannot have that name.",
            expected=IDENTIFIER_RULE,
            got=repr(contributor[:80]),
            hint="Choose a name such as st-mary-hospital.",
        )
    if role not in ROLES:
        raise ConfigError(
            "invite.unknown_role",
            f"There is no role {role[:40]!r}.",
            expected=" or ".join(ROLES),
            got=role[:40],
            hint="A contributor sends and evaluates; an evaluator only evaluates; an auditor "
            "only reads; an admin steers.",
        )
    if not SHORTEST_TTL <= ttl <= LONGEST_TTL:
        raise ConfigError(
            "invite.bad_ttl",
            "An invitation cannot hold that long.",
            expected=f"{SHORTEST_TTL} to {LONGEST_TTL}",
            got=ttl,
            hint="Give --ttl such as 24h.",
        )


def machines_of(session: Session, contributor: str) -> list[Machine]:
    """An organization's machines, by name."""
    query = select(Machine).where(Machine.contributor == contributor).order_by(Machine.name)
    return list(session.scalars(query))


def list_contributors(session: Session) -> list[Contributor]:
    """All organizations, by name."""
    return list(session.scalars(select(Contributor).order_by(Contributor.name)))


def revoke(
    store: Store,
    contributor: str,
    machine: str,
    reason: str,
    now: datetime,
    *,
    actor: str = LOCAL_ADMIN,
) -> Contributor:
    """Shut an organization, or one machine, out.

    With the organization go its open invitations and its contribution to a round that
    is still OPEN, also one that waits in quarantine; what was sealed is merged, unless the
    admin abandons that round. With a machine go the open invitations for it by its name.

    Raises:
        NotFoundError: no such organization or machine.
    """
    with store.database.write() as session:
        row = people.hold(session, contributor)
        found = people.hold_machine(session, contributor, machine) if machine else None
        if row is None or (machine and found is None):
            raise NotFoundError(
                "contributor.unknown",
                "There is no such organization or machine.",
                got=f"{contributor[:64]}/{machine[:64]}" if machine else contributor[:64],
                hint="List them with `coldmerge contributors`.",
            )
        ids = {"contributor": contributor, "machine": machine or None}
        kind = "machine.revoked" if machine else "contributor.revoked"
        audit.append(session, kind, actor, now, ids=ids, detail={"reason": reason})
        if found is not None:
            found.revoked_at = found.revoked_at or now
            found.revoked_reason = reason[:500] or found.revoked_reason
            _end_invitations(session, Invitation.machine == machine, row, now)
            return row
        row.revoked_at = row.revoked_at or now
        row.revoked_reason = reason[:500] or row.revoked_reason
        _end_invitations(session, true(), row, now)
        taken = _take_back(session, store, contributor, now, actor)
    store.payloads.remove(taken)
    return row


def _end_invitations(
    session: Session, which: ColumnElement[bool], row: Contributor, now: datetime
) -> None:
    query = select(Invitation).where(
        Invitation.contributor == row.name, Invitation.used_at.is_(None), which
    )
    for invitation in session.scalars(query.with_for_update()):
        invitation.expires_at = min(invitation.expires_at, now)


def _take_back(
    session: Session, store: Store, contributor: str, now: datetime, actor: str
) -> list[str]:
    taken = []
    for active in rounds.active_rounds(session):
        round_ = rounds.get(session, active.id, lock=True)
        if round_.state != state.State.OPEN:
            continue
        for found in contributions.live_of(session, round_.id, contributor):
            counted = found.state == contributions.ADMITTED
            found.state, found.payload_erased_at = contributions.WITHDRAWN, now
            session.flush()
            contribution_log.about(session, "contribution.withdrawn", found, actor, now)
            if counted:
                rounds.apply(session, round_, state.Withdrawn(), now, store.signer, actor=actor)
            taken.append(found.payload)
    return taken


def open_round(
    store: Store, model: str, policy_json: str, now: datetime, *, actor: str = LOCAL_ADMIN
) -> Round:
    """Open a round on the model's latest release.

    `policy_json` holds the policy keys that replace those of the model's template.

    Raises:
        NotFoundError: no such model.
        ConfigError: the policy is malformed.
        ConflictError: a round is active.
    """
    changes = _policy_changes(policy_json) if policy_json else {}
    with store.database.write() as session:
        standing = releases.get_model(session, model).template
        template = parse_template({**standing, **changes}, "of the call")
        return rounds.open_round(session, model, template.policy(), now, actor=actor)


def _policy_changes(policy_json: str) -> dict[str, object]:
    try:
        values = json.loads(policy_json)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    else:
        if isinstance(values, dict):
            return values
        problem = f"it is a {type(values).__name__}"
    raise ConfigError(
        "policy.not_json",
        f"The round policy of the call is not a JSON object: {problem}.",
        hint="Give a YAML file to `coldmerge round open --policy`.",
    )


def move_round(
    store: Store, round_id: str, event: Event, now: datetime, *, actor: str = LOCAL_ADMIN
) -> Round:
    """Apply an admin's event (Seal, Abandon, Extend, Resolve) to a round.

    Raises:
        NotFoundError: no such round.
        ConflictError: the event does not fit its state.
    """
    with store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        rounds.apply(session, row, event, now, store.signer, actor=actor)
        return row


def extend_round(
    store: Store, round_id: str, by: timedelta, now: datetime, *, actor: str = LOCAL_ADMIN
) -> Round:
    """Move the deadline the round waits for.

    Raises:
        ConfigError: not a positive length of time.
        NotFoundError: no such round.
        ConflictError: it waits for no deadline.
    """
    if not timedelta(0) < by <= timedelta(days=3650):
        raise ConfigError(
            "round.bad_extension",
            "A deadline cannot be moved by that much.",
            expected="more than 0 and at most 3650 days",
            got=by,
            hint="Give --by such as 2h.",
        )
    return move_round(store, round_id, state.Extend(by), now, actor=actor)


def rollback(
    store: Store,
    model: str,
    number: int,
    reason: str,
    now: datetime,
    *,
    actor: str = LOCAL_ADMIN,
) -> Release:
    """Publish an old release again under the next number.

    Raises:
        NotFoundError: no such model or release.
        ConflictError: a round is active, or it is the latest already.
    """
    with store.database.write() as session:
        return releases.rollback(
            session, store.signer, model, number, reason[:500], now, actor=actor
        )


def remerge(
    store: Store,
    model: str,
    without: Sequence[str],
    reason: str,
    now: datetime,
    *,
    actor: str = LOCAL_ADMIN,
) -> Round:
    """Open a round that makes the latest release again, without some contributions.

    Raises:
        NotFoundError: no such model, contribution or contributor.
        ConflictError: a round is active, nothing would change, or inputs were erased.
        ConfigError: nobody is named, or a method cannot merge what is left.
    """
    with store.database.write() as session:
        row = remerges.open_remerge(session, model, without, reason[:500], now, actor=actor)
        ids = {"model": model, "round": row.id}
        detail: dict[str, audit.Scalar] = {"without": ", ".join(without), "reason": reason}
        audit.append(session, "round.remerge_opened", actor, now, ids=ids, detail=detail)
        return row
