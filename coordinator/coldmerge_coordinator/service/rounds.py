"""`coldmerge.v1.Rounds`: following rounds, judging candidates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import common_pb2, rounds_pb2, rounds_pb2_grpc
from coldmerge_coordinator.auth import Caller, caller
from coldmerge_coordinator.service import evaluations
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.messages import round_message
from coldmerge_coordinator.store import releases, rounds

DEFAULT_LIMIT = 50
MAX_LIMIT = 500


class RoundsService(rounds_pb2_grpc.RoundsServicer):
    """What participants see of rounds, and what they say about candidates."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._store = backend.store

    async def Get(self, request: rounds_pb2.GetRoundRequest, _context: Any) -> common_pb2.Round:
        """One round."""
        return await asyncio.to_thread(self._get, caller(), request.id)

    def _get(self, who: Caller, round_id: str) -> common_pb2.Round:
        with self._store.database.read() as session:
            return round_message(session, rounds.get(session, round_id), who)

    async def List(
        self, request: rounds_pb2.ListRoundsRequest, _context: Any
    ) -> rounds_pb2.ListRoundsResponse:
        """A model's rounds, newest first."""
        return await asyncio.to_thread(self._list, caller(), request)

    def _list(
        self, who: Caller, request: rounds_pb2.ListRoundsRequest
    ) -> rounds_pb2.ListRoundsResponse:
        limit = min(request.limit if request.limit > 0 else DEFAULT_LIMIT, MAX_LIMIT)
        with self._store.database.read() as session:
            releases.get_model(session, request.model)
            rows = rounds.list_rounds(session, request.model, limit)
            return rounds_pb2.ListRoundsResponse(
                rounds=[round_message(session, row, who) for row in rows]
            )

    async def Watch(
        self, request: rounds_pb2.WatchRoundsRequest, _context: Any
    ) -> AsyncIterator[common_pb2.Round]:
        """The newest round, then every change of it."""
        who, pulse, last = caller(), self._backend.pulse, None
        while True:
            ticket = pulse.ticket()
            newest = await asyncio.to_thread(self._newest, who, request.model)
            if newest is not None and newest != last:
                last = newest
                yield newest
            await pulse.wait(ticket)
            await self._backend.recheck(who)

    def _newest(self, who: Caller, model: str) -> common_pb2.Round | None:
        with self._store.database.read() as session:
            releases.get_model(session, model)
            row = rounds.newest_round(session, model)
            return None if row is None else round_message(session, row, who)

    async def ReportEvaluation(
        self, request: rounds_pb2.ReportEvaluationRequest, _context: Any
    ) -> common_pb2.Round:
        """A signed, paired evaluation of the candidate."""
        return await asyncio.to_thread(self._report, caller(), request)

    def _report(self, who: Caller, request: rounds_pb2.ReportEvaluationRequest) -> common_pb2.Round:
        signed = signed_from_proto(request.evaluation)
        now, signer = self._backend.clock.now(), self._store.signer
        with self._store.database.write() as session:
            row = evaluations.report(session, who, signed, now, signer)
            return round_message(session, row, who)
