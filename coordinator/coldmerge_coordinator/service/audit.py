"""`coldmerge.v1.Audit`: the evidence, for everyone to check and for auditors to read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.wire.convert import signed_to_proto
from coldmerge.wire.v1 import audit_pb2, audit_pb2_grpc
from coldmerge_coordinator.audit import checkpoints
from coldmerge_coordinator.auth import caller
from coldmerge_coordinator.service.backend import Backend

PAGE = 500


class AuditService(audit_pb2_grpc.AuditServicer):
    """Checkpoints and proofs for every participant, entries for auditors."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._store = backend.store

    async def Checkpoint(
        self, request: audit_pb2.CheckpointRequest, _context: Any
    ) -> audit_pb2.CheckpointResponse:
        """The log's signed head, and that it extends the one the caller knows."""
        return await asyncio.to_thread(self._checkpoint, request.from_size)

    def _checkpoint(self, from_size: int) -> audit_pb2.CheckpointResponse:
        signed = checkpoints.current(self._store, self._backend.clock.now())
        size = AuditCheckpoint.parse(signed.document).size
        with self._store.database.read() as session:
            proof = checkpoints.consistency(session, from_size, size)
        return audit_pb2.CheckpointResponse(checkpoint=signed_to_proto(signed), consistency=proof)

    async def Prove(
        self, request: audit_pb2.ProveRequest, _context: Any
    ) -> audit_pb2.ProveResponse:
        """That an entry is in the log."""
        return await asyncio.to_thread(self._prove, request.leaf_hash, request.size)

    def _prove(self, leaf: bytes, size: int) -> audit_pb2.ProveResponse:
        with self._store.database.read() as session:
            found = checkpoints.inclusion(session, leaf, size)
        return audit_pb2.ProveResponse(position=found.position, inclusion=found.proof)

    async def Read(
        self, request: audit_pb2.ReadAuditRequest, _context: Any
    ) -> AsyncIterator[audit_pb2.AuditLeaf]:
        """The entries, in order, page by page."""
        who, at = caller(), max(request.start, 0)
        end = at + request.limit if request.limit > 0 else None
        while end is None or at < end:
            page = PAGE if end is None else min(PAGE, end - at)
            found = await asyncio.to_thread(self._page, at, page)
            for leaf in found:
                yield leaf
            at += len(found)
            if len(found) < page:
                return
            await self._backend.recheck(who)

    def _page(self, start: int, limit: int) -> list[audit_pb2.AuditLeaf]:
        with self._store.database.read() as session:
            return [
                audit_pb2.AuditLeaf(position=position, document=document)
                for position, document in checkpoints.entries(session, start, limit)
            ]
