"""`coldmerge.v1.Screening`: what waits for a decision, what a round saw, who sent what."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.rounds import state
from coldmerge.rounds.state import State
from coldmerge.wire.convert import timestamp
from coldmerge.wire.v1 import contributions_pb2, screening_pb2, screening_pb2_grpc
from coldmerge_coordinator.auth import Caller, caller, refuse_revoked
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.messages import contribution_message
from coldmerge_coordinator.service.rules import check_open
from coldmerge_coordinator.service.screens import told
from coldmerge_coordinator.store import (
    continuous,
    contribution_log,
    contributions,
    learned,
    people,
    rounds,
)
from coldmerge_coordinator.store.models import Contribution, Contributor, Round

DEFAULT_LIMIT = 50
MAX_LIMIT = 500
MAX_REASON = 500


class ScreeningService(screening_pb2_grpc.ScreeningServicer):
    """Each call is one transaction on a thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._store = backend.store

    async def ListQuarantine(
        self, request: screening_pb2.ListQuarantineRequest, _context: Any
    ) -> screening_pb2.ListQuarantineResponse:
        """What waits for an admin."""
        return await asyncio.to_thread(self._list, request.model)

    def _list(self, model: str) -> screening_pb2.ListQuarantineResponse:
        query = (
            select(Contribution, Round)
            .join(Round, Round.id == Contribution.round)
            .where(Contribution.state == contributions.QUARANTINED, Round.state == State.OPEN)
            .order_by(Contribution.accepted_at, Contribution.id)
        )
        if model:
            query = query.where(Contribution.model == model)
        with self._store.database.read() as session:
            waiting = [
                screening_pb2.QuarantinedContribution(
                    contribution=contribution_message(row),
                    reason=row.reason or "",
                    norm=row.norm,
                    reference_norm=(round_.screening or {}).get("reference_norm") or 0.0,
                )
                for row, round_ in session.execute(query)
            ]
        return screening_pb2.ListQuarantineResponse(contributions=waiting)

    async def Accept(
        self, request: screening_pb2.QuarantineDecision, _context: Any
    ) -> contributions_pb2.Contribution:
        """Admit a contribution that waits."""
        return await self._backend.bulk(partial(self._accept, caller(), request))

    def _accept(
        self, who: Caller, request: screening_pb2.QuarantineDecision
    ) -> contributions_pb2.Contribution:
        now, signer = self._backend.clock.now(), self._store.signer
        with self._store.database.write() as session:
            sender = contributions.get(session, request.contribution).contributor
            refuse_revoked(session.get_one(Contributor, sender, **people.SHARE), None)
            row, round_ = _waiting(session, request.contribution)
            check_open(round_)
            older = contributions.admitted_of(session, round_.id, row.contributor)
            if older is not None:
                older.state = contributions.REPLACED
                session.flush()
                contribution_log.about(
                    session, "contribution.replaced", older, who.actor, now, by=row.id
                )
            row.state, row.reason = contributions.ADMITTED, request.reason[:MAX_REASON] or None
            contribution_log.about(
                session, "contribution.accepted", row, who.actor, now, reason=request.reason
            )
            session.flush()
            rounds.apply(session, round_, state.Contributed(), now, signer, actor=who.actor)
            message = contribution_message(row)
        if older is not None:
            self._store.payloads.remove([older.payload])
        return message

    async def Refuse(
        self, request: screening_pb2.QuarantineDecision, _context: Any
    ) -> contributions_pb2.Contribution:
        """Leave a contribution out for good."""
        return await self._backend.bulk(partial(self._refuse, caller(), request))

    def _refuse(
        self, who: Caller, request: screening_pb2.QuarantineDecision
    ) -> contributions_pb2.Contribution:
        now = self._backend.clock.now()
        with self._store.database.write() as session:
            row, _ = _waiting(session, request.contribution)
            row.state = contributions.REFUSED
            row.reason = request.reason[:MAX_REASON] or row.reason
            row.payload_erased_at = now
            contribution_log.about(
                session, "contribution.refused", row, who.actor, now, reason=request.reason
            )
            message = contribution_message(row)
        self._store.payloads.remove([row.payload])
        return message

    async def GetReport(
        self, request: screening_pb2.GetReportRequest, _context: Any
    ) -> screening_pb2.Report:
        """What one round saw."""
        return await asyncio.to_thread(self._report, request.round)

    def _report(self, round_id: str) -> screening_pb2.Report:
        with self._store.database.read() as session:
            row = rounds.get(session, round_id)
            rows = contributions.of_round(session, round_id)
            learnt = learned.weights_of(row)
            body = {
                **(row.screening or {}),
                "coefficients": {name: dict(kept) for name, kept in learnt.of.items()}
                if learnt
                else {},
                "contributions": [
                    {
                        "contribution": item.id,
                        "contributor": item.contributor,
                        "manifest": item.manifest_digest,
                        "state": item.state,
                        "norm": item.norm,
                        "reason": item.reason,
                    }
                    for item in rows
                ],
            }
        return screening_pb2.Report(round=round_id, report_json=json.dumps(body, sort_keys=True))

    async def GetHistory(
        self, request: screening_pb2.GetHistoryRequest, _context: Any
    ) -> screening_pb2.History:
        """What one contributor sent."""
        return await asyncio.to_thread(self._history, caller(), request)

    def _history(
        self, who: Caller, request: screening_pb2.GetHistoryRequest
    ) -> screening_pb2.History:
        name = request.contributor or who.contributor
        limit = min(request.limit if request.limit > 0 else DEFAULT_LIMIT, MAX_LIMIT)
        with self._store.database.read() as session:
            known = session.get(Contributor, name)
            if known is None or (name != who.contributor and not who.sees_all):
                raise NotFoundError(
                    "contributor.unknown",
                    "There is no such organization or machine.",
                    got=name[:64],
                    hint="List them with `coldmerge contributors`.",
                )
            query = (
                select(Contribution, Round)
                .join(Round, Round.id == Contribution.round)
                .where(Contribution.contributor == name)
                .order_by(Contribution.accepted_at.desc(), Contribution.id)
                .limit(limit)
            )
            entries = [_entry(row, round_) for row, round_ in session.execute(query)]
        return screening_pb2.History(contributor=name, entries=entries)


def _waiting(session: Session, identifier: str) -> tuple[Contribution, Round]:
    """A quarantined contribution and its round, which nobody else moves meanwhile.

    Raises:
        NotFoundError: there is none of that id.
        ConflictError: it does not wait for a decision.
    """
    round_ = rounds.get(session, contributions.get(session, identifier).round, lock=True)
    row = contributions.get(session, identifier)
    session.refresh(row)
    if row.state != contributions.QUARANTINED:
        raise ConflictError(
            "contribution.not_quarantined",
            "The contribution does not wait for a decision.",
            expected=contributions.QUARANTINED,
            got=row.state,
            hint="List what waits with `coldmerge quarantine list`.",
            contribution=row.id,
            round=row.round,
        )
    return row, round_


def _entry(row: Contribution, round_: Round) -> screening_pb2.HistoryEntry:
    known = round_.screening or {}
    seen = {item["manifest"]: item for item in known.get("report", {}).get("inputs", ())}
    merged = row.manifest_digest in contributions.kept(round_)
    return screening_pb2.HistoryEntry(
        round=row.round,
        model=row.model,
        state=row.state,
        reason=told(row),
        accepted_at=timestamp(row.accepted_at),
        norm=row.norm,
        reference_norm=known.get("reference_norm") or 0.0,
        clip_factor=known.get("factors", {}).get(row.manifest_digest, 1.0),
        cosine_to_merged=seen.get(row.manifest_digest, {}).get("cosine_to_merged", 0.0),
        isolated=row.manifest_digest in (round_.left_out or ()),
        release_number=(round_.release_number or 0) if merged else 0,
        discount=continuous.frozen(round_).get(row.manifest_digest, {}).get("discount", 1.0),
    )
