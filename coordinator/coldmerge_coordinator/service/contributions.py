"""`coldmerge.v1.Contributions`: shipping a task vector."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from sqlalchemy import select

from coldmerge.core.errors import ManifestError
from coldmerge.wire.channel import CHUNK_BYTES
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import contributions_pb2, contributions_pb2_grpc
from coldmerge_coordinator.auth import Caller, caller
from coldmerge_coordinator.limits import brisk
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.intake import Intake
from coldmerge_coordinator.service.messages import contribution_message, receipt_message
from coldmerge_coordinator.service.refusals import Refusals
from coldmerge_coordinator.service.rules import own
from coldmerge_coordinator.service.uploads import LiveUpload
from coldmerge_coordinator.store.models import Contribution

RECHECK_SECONDS = 1.0
MAX_LISTED = 1000


class ContributionsService(contributions_pb2_grpc.ContributionsServicer):
    """Handlers; `Intake` decides and stores."""

    def __init__(self, backend: Backend, intake: Intake) -> None:
        self._backend = backend
        self._store = backend.store
        self._intake = intake
        self._refusals = Refusals(backend.store, backend.clock)

    async def Begin(
        self, request: contributions_pb2.BeginRequest, _context: Any
    ) -> contributions_pb2.BeginResponse:
        """Announce a contribution."""
        return await self._backend.bulk(partial(self._begin, caller(), request))

    def _begin(
        self, who: Caller, request: contributions_pb2.BeginRequest
    ) -> contributions_pb2.BeginResponse:
        with self._refusals.logged(who, "Begin"):
            found = self._intake.begin(who, signed_from_proto(request.manifest))
        if isinstance(found, Contribution):
            return contributions_pb2.BeginResponse(
                committed_size=found.payload_bytes,
                total_size=found.payload_bytes,
                receipt=receipt_message(found),
            )
        return contributions_pb2.BeginResponse(
            upload_id=found.id, committed_size=found.flush(), total_size=found.total
        )

    async def Write(
        self, requests: AsyncIterator[contributions_pb2.WriteRequest], _context: Any
    ) -> contributions_pb2.WriteResponse:
        """Take bytes as they come; what came is durable even when the stream breaks."""
        who, backend = caller(), self._backend
        live: LiveUpload | None = None
        ticket = 0
        watch = _Watch(self._backend, self._intake)
        try:
            async for request in brisk(requests, self._store.config.limits.idle_seconds):
                if live is None:
                    live = await backend.bulk(partial(self._intake.find, who, request.upload_id))
                    await asyncio.to_thread(self._intake.check_admissible, live)
                    ticket = await backend.bulk(live.take)
                offset, data = request.chunk.offset, request.chunk.data  # each look is a copy
                _check_chunk(request.upload_id, data, live)
                await watch.look(live)
                await backend.bulk(partial(self._write, who, live, ticket, offset, data))
        finally:
            committed = 0
            if live is not None:
                committed = await asyncio.shield(backend.bulk(live.flush))
        return contributions_pb2.WriteResponse(committed_size=committed)

    def _write(self, who: Caller, live: LiveUpload, ticket: int, offset: int, data: bytes) -> None:
        with self._refusals.logged(who, "Write"):
            live.write(ticket, offset, data)

    async def QueryWriteStatus(
        self, request: contributions_pb2.QueryWriteStatusRequest, _context: Any
    ) -> contributions_pb2.WriteStatus:
        """How far an upload got; what came is made durable first."""
        return await self._backend.bulk(partial(self._status, caller(), request.upload_id))

    def _status(self, who: Caller, upload: str) -> contributions_pb2.WriteStatus:
        live = self._intake.find(who, upload)
        return contributions_pb2.WriteStatus(committed_size=live.flush(), total_size=live.total)

    async def Commit(
        self, request: contributions_pb2.CommitRequest, _context: Any
    ) -> contributions_pb2.CommitResponse:
        """Admit a complete upload."""
        work = partial(self._commit, caller(), request.upload_id)
        row = await asyncio.shield(self._backend.bulk(work))
        return contributions_pb2.CommitResponse(receipt=receipt_message(row))

    def _commit(self, who: Caller, upload: str) -> Contribution:
        with self._refusals.logged(who, "Commit"):
            return self._intake.commit(who, upload)

    async def Get(
        self, request: contributions_pb2.GetContributionRequest, _context: Any
    ) -> contributions_pb2.Contribution:
        """One contribution."""
        return await asyncio.to_thread(self._get, caller(), request.id)

    def _get(self, who: Caller, identifier: str) -> contributions_pb2.Contribution:
        with self._store.database.read() as session:
            return contribution_message(own(session, identifier, who))

    async def List(
        self, request: contributions_pb2.ListContributionsRequest, _context: Any
    ) -> contributions_pb2.ListContributionsResponse:
        """The caller's contributions; everybody's for an auditor or admin."""
        return await asyncio.to_thread(self._list, caller(), request)

    def _list(
        self, who: Caller, request: contributions_pb2.ListContributionsRequest
    ) -> contributions_pb2.ListContributionsResponse:
        query = select(Contribution)
        if not who.sees_all:
            query = query.where(Contribution.contributor == who.contributor)
        if request.model:
            query = query.where(Contribution.model == request.model)
        if request.round:
            query = query.where(Contribution.round == request.round)
        query = query.order_by(Contribution.accepted_at.desc(), Contribution.id).limit(MAX_LISTED)
        with self._store.database.read() as session:
            rows = [contribution_message(row) for row in session.scalars(query)]
        return contributions_pb2.ListContributionsResponse(contributions=rows)

    async def Withdraw(
        self, request: contributions_pb2.WithdrawRequest, _context: Any
    ) -> contributions_pb2.Contribution:
        """Take a contribution back."""
        row = await self._backend.bulk(partial(self._intake.withdraw, caller(), request.id))
        return contribution_message(row)


class _Watch:
    """Within a stream: looks every second whether its round still takes what comes.

    Whether the caller still may call at all, the sentry looks.
    """

    def __init__(self, backend: Backend, intake: Intake) -> None:
        self._backend, self._intake = backend, intake
        self._looked = time.monotonic()

    async def look(self, live: LiveUpload) -> None:
        self._backend.pulse.check_running()
        now = time.monotonic()
        if now - self._looked < RECHECK_SECONDS:
            return
        self._looked = now
        await asyncio.to_thread(self._intake.check_admissible, live)


def _check_chunk(upload: str, data: bytes, live: LiveUpload) -> None:
    if upload not in ("", live.id) or len(data) > CHUNK_BYTES:
        raise ManifestError(
            "upload.bad_chunk",
            "A message of the stream is for another upload, or too large.",
            expected=f"upload {live.id}, at most {CHUNK_BYTES} bytes",
            got=f"upload {upload[:80]}, {len(data)} bytes",
            hint="Send one upload per stream, in chunks of at most 1 MiB.",
        )
