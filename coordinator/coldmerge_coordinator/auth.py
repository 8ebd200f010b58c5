"""Who calls, and whether they may: decided for every call, default deny.

The certificate says which machine calls; the database, read on every call, says whether
it still may and in which role. No request field is ever believed about that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select

from coldmerge.core.errors import (
    ColdmergeError,
    ConflictError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from coldmerge.wire.version import PROTOCOL_KEY
from coldmerge_coordinator.identity import Peer, identity_fingerprint
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Contributor, Machine

ROLES = ("contributor", "evaluator", "auditor", "admin")
NAMES_PER_QUERY = 500

_EVERYONE = frozenset(ROLES)
_JUDGES = frozenset({"contributor", "evaluator", "admin"})
_SENDERS = frozenset({"contributor", "admin"})
_READERS = frozenset({"contributor", "auditor", "admin"})
_OVERSEERS = frozenset({"auditor", "admin"})
_ADMINS = frozenset({"admin"})


def _methods(service: str, methods: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    return {f"/coldmerge.v1.{service}/{method}": roles for method, roles in methods.items()}


ALLOWED: dict[str, frozenset[str]] = {
    **_methods(
        "Models",
        dict.fromkeys(
            (
                "ListModels",
                "GetRelease",
                "ListReleases",
                "WatchReleases",
                "ListKeys",
                "ReadBlob",
            ),
            _EVERYONE,
        ),
    ),
    **_methods(
        "Rounds",
        {"Get": _EVERYONE, "List": _EVERYONE, "Watch": _EVERYONE, "ReportEvaluation": _JUDGES},
    ),
    **_methods(
        "Contributions",
        {
            **dict.fromkeys(("Begin", "Write", "QueryWriteStatus", "Commit", "Withdraw"), _SENDERS),
            "Get": _READERS,
            "List": _READERS,
        },
    ),
    **_methods("Audit", {"Checkpoint": _EVERYONE, "Prove": _EVERYONE, "Read": _OVERSEERS}),
    **_methods(
        "Screening",
        {
            "ListQuarantine": _OVERSEERS,
            "Accept": _ADMINS,
            "Refuse": _ADMINS,
            "GetReport": _OVERSEERS,
            "GetHistory": _READERS,
        },
    ),
    **_methods(
        "Admin",
        dict.fromkeys(
            (
                "Invite",
                "ListContributors",
                "Revoke",
                "OpenRound",
                "SealRound",
                "AbandonRound",
                "ExtendRound",
                "ResolveRound",
                "Rollback",
                "Remerge",
                "ListRoundContributions",
            ),
            _ADMINS,
        ),
    ),
}
"""Which roles may call which method. A method that is not here may be called by nobody."""


@dataclass(frozen=True)
class Caller:
    """A machine whose certificate and database rows were checked just now."""

    contributor: str
    machine: str
    role: str
    identity_public_key: bytes = b""
    peer: Peer | None = None

    @property
    def identity(self) -> Ed25519PublicKey:
        """The key that signs this machine's manifests and evaluations.

        Raises:
            PermissionDeniedError: the call came through the admin's socket.
        """
        if not self.identity_public_key:
            raise PermissionDeniedError(
                "auth.no_identity",
                "The admin's socket has no identity key: nothing can be signed there.",
                hint="Enrol a machine with `coldmerge join` and call from there.",
            )
        return Ed25519PublicKey.from_public_bytes(self.identity_public_key)

    @property
    def actor(self) -> str:
        """Who this is, as the audit log says it."""
        return f"{self.contributor}/{self.machine}" if self.machine else self.contributor

    @property
    def sees_all(self) -> bool:
        """Whether other contributors' contributions may be listed."""
        return self.role in {"auditor", "admin"}


_caller: ContextVar[Caller] = ContextVar("caller")


def set_caller(found: Caller) -> None:
    """Remember who makes the call that this task handles."""
    _caller.set(found)


def caller() -> Caller:
    """Who makes the call that is being handled."""
    return _caller.get()


def check_machine(store: Store, peer: Peer, now: datetime) -> Caller:
    """Read what the database says now about the bearer of a certificate.

    Raises:
        UnauthenticatedError: of another federation, expired, unknown, or replaced.
        PermissionDeniedError: the contributor or the machine is revoked.
    """
    _check_certificate(store, peer, now)
    with store.database.read() as session:
        machine = session.get(Machine, (peer.contributor, peer.machine))
        contributor = session.get(Contributor, peer.contributor)
    return _bearer(peer, contributor, machine)


def check_machines(
    store: Store, peers: Collection[Peer], now: datetime
) -> dict[Peer, Caller | ColdmergeError]:
    """`check_machine` for many, in one look at the database: the caller, or why not."""
    names = sorted({peer.contributor for peer in peers})
    machines: dict[tuple[str, str], tuple[Contributor, Machine]] = {}
    with store.database.read() as session:
        for start in range(0, len(names), NAMES_PER_QUERY):
            some = names[start : start + NAMES_PER_QUERY]
            query = select(Contributor, Machine).join(Machine).where(Contributor.name.in_(some))
            for contributor, machine in session.execute(query):
                machines[contributor.name, machine.name] = (contributor, machine)
    found: dict[Peer, Caller | ColdmergeError] = {}
    for peer in peers:
        try:
            _check_certificate(store, peer, now)
            rows = machines.get((peer.contributor, peer.machine), (None, None))
            found[peer] = _bearer(peer, *rows)
        except ColdmergeError as error:
            found[peer] = error
    return found


def _check_certificate(store: Store, peer: Peer, now: datetime) -> None:
    if peer.federation != store.federation:
        raise UnauthenticatedError(
            "auth.other_federation",
            "The certificate belongs to another federation.",
            expected=store.federation,
            got=peer.federation,
            hint="Check which coordinator this machine was enrolled with.",
        )
    if peer.expires_at <= now:
        raise UnauthenticatedError(
            "auth.expired",
            f"The certificate of {peer.contributor}/{peer.machine} has expired.",
            expected=f"a certificate valid at {now.isoformat()}",
            got=f"one valid until {peer.expires_at.isoformat()}",
            hint="Renew it: every `coldmerge` command of a contributor does so by itself.",
        )


def _bearer(peer: Peer, contributor: Contributor | None, machine: Machine | None) -> Caller:
    if (
        machine is None
        or contributor is None
        or identity_fingerprint(machine.identity_public_key) != peer.identity
    ):
        raise UnauthenticatedError(
            "auth.unknown_machine",
            f"{peer.contributor}/{peer.machine} is not enrolled with this certificate.",
            hint="Ask the admin for an invitation, then `coldmerge join`.",
        )
    refuse_revoked(contributor, machine)
    return Caller(
        peer.contributor, peer.machine, contributor.role, machine.identity_public_key, peer
    )


def refuse_revoked(contributor: Contributor, machine: Machine | None) -> None:
    """Stop at a revoked contributor or machine.

    Raises:
        PermissionDeniedError: one of them is revoked.
    """
    if contributor.revoked_at is None and (machine is None or machine.revoked_at is None):
        return
    raise PermissionDeniedError(
        "auth.revoked",
        f"{contributor.name} was shut out of this federation."
        if contributor.revoked_at is not None or machine is None
        else f"The machine {machine.name} of {contributor.name} was shut out.",
        hint="Ask the coordinator's admin why; a new invitation is needed to come back.",
        contributor=contributor.name,
        machine=None if machine is None else machine.name,
    )


def check_role(found: Caller, method: str) -> None:
    """Refuse a method that the caller's role may not call.

    Raises:
        PermissionDeniedError: `method` is not in `ALLOWED` for this role.
    """
    roles = ALLOWED.get(method, frozenset())
    if found.role in roles:
        return
    raise PermissionDeniedError(
        "auth.wrong_role",
        f"{found.contributor} may not call {method.rsplit('/', 1)[-1]}.",
        expected=" or ".join(sorted(roles)) or "nobody",
        got=found.role,
        hint="Ask the admin for an invitation with the role that you need.",
    )


def check_protocol(metadata: Mapping[str, Any], minimum: int) -> None:
    """Refuse a client that speaks an older protocol than the coordinator's minimum.

    Raises:
        ConflictError: no protocol version was sent, or one below `minimum`.
    """
    sent = str(metadata.get(PROTOCOL_KEY, ""))
    if sent.isascii() and sent.isdigit() and len(sent) < 10 and int(sent) >= minimum:
        return
    raise ConflictError(
        "protocol.too_old",
        "This client speaks a protocol that the coordinator no longer accepts.",
        expected=f"protocol {minimum} or newer",
        got=f"protocol {sent[:20]}" if sent else "no protocol version",
        hint="Install the coordinator's version of coldmerge: see `coldmerge --version`.",
    )
