"""Who may call what, on whose objects: the whole table, written from the documents.

`RULES` has a row for every method of every proto; `python -m tests.attacks.matrix` prints how
many pairs of it `test_matrix.py` calls. Nothing here is read from the coordinator's own table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import coldmerge.wire.v1 as wire

CONTRIBUTOR, EVALUATOR, AUDITOR, ADMIN = "contributor", "evaluator", "auditor", "admin"
ROLES = (CONTRIBUTOR, EVALUATOR, AUDITOR, ADMIN)
SOCKET, ENROLMENT = "the admin's socket", "the enrolment listener"
OUTSIDERS = {
    "revoked organization": "auth.revoked",
    "revoked machine": "auth.revoked",
    "role taken from it": "auth.wrong_role",
    "replaced key": "auth.unknown_machine",
    "expired on an open connection": "auth.expired",
    "certificate that names another federation": "auth.other_federation",
    "expired certificate": "handshake",
    "other federation's certificate": "handshake",
    "no certificate": "handshake",
}
"""Callers who may call nothing, and what they are told. `handshake`: not even that."""
CALLERS = (*ROLES, *OUTSIDERS, SOCKET, ENROLMENT)

OWN, OTHER, NONE, SHARED = "own", "somebody else's", "none", "the federation's"
NOT_SERVED = "wire.failed"


@dataclass(frozen=True)
class Rule:
    """Who may call a method.

    `owned`: what it is about belongs to one contributor; role → owner → answer, "" being
    success. `local`: the admin's socket has it too.
    """

    roles: frozenset[str]
    owned: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    local: bool = True

    @property
    def owners(self) -> tuple[str, ...]:
        """Whose objects the method is called with."""
        return (OWN, OTHER, NONE) if self.owned else (SHARED, NONE)


def _roles(*names: str) -> frozenset[str]:
    return frozenset(names)


EVERYBODY = _roles(*ROLES)
ONLY_ADMIN = _roles(ADMIN)


def _mine(code: str, *senders: str, **others: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """What is one's own works; what is somebody else's looks as if it were not there."""
    return {**{role: {OWN: "", OTHER: code, NONE: code} for role in senders}, **others}


_SEES_ALL = {OWN: "", OTHER: "", NONE: "contribution.not_yours"}
_HISTORY = _mine(
    "contributor.unknown",
    CONTRIBUTOR,
    **{role: {OWN: "", OTHER: "", NONE: "contributor.unknown"} for role in (AUDITOR, ADMIN)},
)
_UPLOAD = _mine("upload.unknown", CONTRIBUTOR, ADMIN)

RULES: dict[str, Rule] = {
    "Models/ListModels": Rule(EVERYBODY),
    "Models/GetRelease": Rule(EVERYBODY),
    "Models/ListReleases": Rule(EVERYBODY),
    "Models/WatchReleases": Rule(EVERYBODY),
    "Models/ListKeys": Rule(EVERYBODY),
    "Models/ReadBlob": Rule(EVERYBODY),
    "Rounds/Get": Rule(EVERYBODY),
    "Rounds/List": Rule(EVERYBODY),
    "Rounds/Watch": Rule(EVERYBODY),
    "Rounds/ReportEvaluation": Rule(
        _roles(CONTRIBUTOR, EVALUATOR, ADMIN),
        {
            role: {
                OWN: "round.wrong_state",
                OTHER: "evaluation.wrong_addressee",
                NONE: "document.bad_signature",
            }
            for role in (CONTRIBUTOR, EVALUATOR, ADMIN)
        },
    ),
    "Contributions/Begin": Rule(
        _roles(CONTRIBUTOR, ADMIN),
        {
            role: {OWN: "", OTHER: "manifest.wrong_addressee", NONE: "document.bad_signature"}
            for role in (CONTRIBUTOR, ADMIN)
        },
        local=False,
    ),
    "Contributions/Write": Rule(_roles(CONTRIBUTOR, ADMIN), _UPLOAD, local=False),
    "Contributions/QueryWriteStatus": Rule(_roles(CONTRIBUTOR, ADMIN), _UPLOAD, local=False),
    "Contributions/Commit": Rule(_roles(CONTRIBUTOR, ADMIN), _UPLOAD, local=False),
    "Contributions/Get": Rule(
        _roles(CONTRIBUTOR, AUDITOR, ADMIN),
        _mine("contribution.not_yours", CONTRIBUTOR, auditor=_SEES_ALL, admin=_SEES_ALL),
        local=False,
    ),
    "Contributions/List": Rule(
        _roles(CONTRIBUTOR, AUDITOR, ADMIN),
        {role: {OWN: "", OTHER: "", NONE: ""} for role in (CONTRIBUTOR, AUDITOR, ADMIN)},
        local=False,
    ),
    "Contributions/Withdraw": Rule(
        _roles(CONTRIBUTOR, ADMIN),
        _mine("contribution.not_yours", CONTRIBUTOR, ADMIN),
        local=False,
    ),
    "Admin/Invite": Rule(ONLY_ADMIN),
    "Admin/ListContributors": Rule(ONLY_ADMIN),
    "Admin/Revoke": Rule(ONLY_ADMIN, {ADMIN: {OWN: "", OTHER: "", NONE: "contributor.unknown"}}),
    "Admin/OpenRound": Rule(ONLY_ADMIN),
    "Admin/SealRound": Rule(ONLY_ADMIN),
    "Admin/AbandonRound": Rule(ONLY_ADMIN),
    "Admin/ExtendRound": Rule(ONLY_ADMIN),
    "Admin/ResolveRound": Rule(ONLY_ADMIN),
    "Admin/Rollback": Rule(ONLY_ADMIN),
    "Admin/Remerge": Rule(ONLY_ADMIN),
    "Admin/ListRoundContributions": Rule(ONLY_ADMIN),
    "Audit/Checkpoint": Rule(EVERYBODY),
    "Audit/Prove": Rule(EVERYBODY),
    "Audit/Read": Rule(_roles(AUDITOR, ADMIN)),
    "Screening/ListQuarantine": Rule(_roles(AUDITOR, ADMIN)),
    "Screening/Accept": Rule(ONLY_ADMIN),
    "Screening/Refuse": Rule(ONLY_ADMIN),
    "Screening/GetReport": Rule(_roles(AUDITOR, ADMIN)),
    "Screening/GetHistory": Rule(_roles(CONTRIBUTOR, AUDITOR, ADMIN), _HISTORY),
}
"""Every method behind a certificate."""
OPEN = {"Enrolment/Enrol": "enrolment.bad_proof", "Enrolment/Renew": "enrolment.bad_csr"}
"""Methods for callers without a certificate, and what an empty request is told."""


def methods() -> dict[str, Any]:
    """Every method of every proto, by `Service/Method`: from the descriptors on disk."""
    found = {}
    for path in sorted(Path(wire.__file__).parent.glob("*_pb2.py")):
        descriptor = import_module(f"coldmerge.wire.v1.{path.stem}").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            for method in service.methods:
                found[f"{service.name}/{method.name}"] = method
    return found


def pairs() -> Iterator[tuple[str, str, str]]:
    """All (caller, method, owner) that the test calls."""
    for caller in CALLERS:
        for method, rule in RULES.items():
            for owner in rule.owners:
                yield caller, method, owner
        for method in OPEN:
            yield caller, method, NONE


def expected(caller: str, method: str, owner: str) -> str | None:
    """The code of the answer: "" for success, None for any that is no denial."""
    if caller in OUTSIDERS:
        return OUTSIDERS[caller] if method in RULES else _unserved(caller)
    if method in OPEN:
        return OPEN[method] if caller == ENROLMENT else NOT_SERVED
    rule = RULES[method]
    if caller == ENROLMENT or (caller == SOCKET and not rule.local):
        return NOT_SERVED
    if caller == SOCKET:
        return "auth.no_identity" if method == "Rounds/ReportEvaluation" else None
    if caller not in rule.roles:
        return "auth.wrong_role"
    return rule.owned[caller][owner] if rule.owned else None


def _unserved(caller: str) -> str:
    return "handshake" if OUTSIDERS[caller] == "handshake" else NOT_SERVED


def size() -> str:
    """How large the table is, in words."""
    count = sum(1 for _ in pairs())
    return (
        f"{count} pairs: {len(CALLERS)} callers x {len(RULES) + len(OPEN)} methods "
        "x the owners that each method can be asked about"
    )


if __name__ == "__main__":
    print(size())
