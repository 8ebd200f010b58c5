"""`coldmerge.v1.Models`: models, releases, and their bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from coldmerge.core.errors import ConfigError, NotFoundError
from coldmerge.wire.channel import CHUNK_BYTES
from coldmerge.wire.convert import signed_to_proto
from coldmerge.wire.v1 import common_pb2, models_pb2, models_pb2_grpc
from coldmerge_coordinator.auth import caller
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.messages import (
    candidate_message,
    model_message,
    release_message,
)
from coldmerge_coordinator.store import keys, learned, releases
from coldmerge_coordinator.store.blobs import Readable


class ModelsService(models_pb2_grpc.ModelsServicer):
    """Reading: the same answers for every role."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._store = backend.store

    async def ListModels(
        self, _request: models_pb2.ListModelsRequest, _context: Any
    ) -> models_pb2.ListModelsResponse:
        """All models."""
        return await asyncio.to_thread(self._list_models)

    def _list_models(self) -> models_pb2.ListModelsResponse:
        with self._store.database.read() as session:
            found = [model_message(session, row) for row in releases.list_models(session)]
        return models_pb2.ListModelsResponse(models=found)

    async def GetRelease(
        self, request: models_pb2.GetReleaseRequest, _context: Any
    ) -> models_pb2.Release:
        """One release or candidate, with its listing."""
        return await asyncio.to_thread(self._get_release, request)

    def _get_release(self, request: models_pb2.GetReleaseRequest) -> models_pb2.Release:
        which = request.WhichOneof("which")
        with self._store.database.read() as session:
            if which == "number":
                row = releases.get_release(session, request.model, request.number)
                return release_message(session, row)
            if which != "content_digest":
                return release_message(session, releases.latest_release(session, request.model))
            digest = request.content_digest
            found = releases.find_release(session, request.model, digest)
            if found is not None:
                return release_message(session, found)
            known = releases.is_candidate(session, request.model, digest)
            if known or learned.is_direction(session, request.model, digest):
                return candidate_message(session, request.model, digest)
        raise NotFoundError(
            "release.no_such_digest",
            f"Model {request.model} has no release or candidate of that content.",
            got=digest[:80],
            hint="Take a candidate's digest from `coldmerge watch --format json`.",
            model=request.model,
        )

    async def ListReleases(
        self, request: models_pb2.ListReleasesRequest, _context: Any
    ) -> models_pb2.ListReleasesResponse:
        """All releases, without content."""
        found = await asyncio.to_thread(self._releases_after, request.model, -1)
        return models_pb2.ListReleasesResponse(releases=found)

    def _releases_after(self, model: str, number: int) -> list[models_pb2.Release]:
        with self._store.database.read() as session:
            releases.get_model(session, model)
            rows = releases.list_releases(session, model, after_number=number)
            return [release_message(session, row, content=False) for row in rows]

    async def WatchReleases(
        self, request: models_pb2.WatchReleasesRequest, _context: Any
    ) -> AsyncIterator[models_pb2.Release]:
        """Releases as they appear."""
        who, pulse, number = caller(), self._backend.pulse, request.after_number
        while True:
            ticket = pulse.ticket()
            for release in await asyncio.to_thread(self._releases_after, request.model, number):
                number = release.number
                yield release
            await pulse.wait(ticket)
            await self._backend.recheck(who)

    async def ListKeys(
        self, _request: models_pb2.ListKeysRequest, _context: Any
    ) -> models_pb2.ListKeysResponse:
        """Which keys signed, and sign."""
        return await asyncio.to_thread(self._list_keys)

    def _list_keys(self) -> models_pb2.ListKeysResponse:
        with self._store.database.read() as session:
            found = keys.announced(session, self._store.signer)
        return models_pb2.ListKeysResponse(keys=[signed_to_proto(said) for said in found])

    async def ReadBlob(
        self, request: models_pb2.ReadBlobRequest, _context: Any
    ) -> AsyncIterator[common_pb2.Chunk]:
        """The bytes of a tensor or file of a release or candidate."""
        backend = self._backend
        file = await asyncio.to_thread(self._open_blob, request)
        try:
            for offset in range(request.offset, file.size, CHUNK_BYTES):
                backend.pulse.check_running()
                stop = min(offset + CHUNK_BYTES, file.size)
                data = await backend.bulk(partial(file.read, offset, stop))
                yield common_pb2.Chunk(offset=offset, data=bytes(data))
        finally:
            file.close()

    def _open_blob(self, request: models_pb2.ReadBlobRequest) -> Readable:
        with self._store.database.read() as session:
            row = releases.get_blob(session, request.sha256)
        if not 0 <= request.offset <= row.nbytes:
            raise ConfigError(
                "blob.bad_offset",
                "The blob does not reach that far.",
                expected=f"an offset from 0 to {row.nbytes}",
                got=request.offset,
                hint="Remove the partial download and start again.",
            )
        return self._store.blobs.stream(row.sha256)
