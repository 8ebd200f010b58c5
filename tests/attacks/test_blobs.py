"""ReadBlob gives out what releases and candidates list, and nothing else."""

from __future__ import annotations

import hashlib

import pytest

from coldmerge.core.errors import ColdmergeError, ConfigError, NotFoundError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import models_pb2
from coldmerge_coordinator.store.models import Blob
from tests.harness import MODEL, Live, MachineClient, deltas, model_tensors

ODD = [
    "",
    "../../coldmerge.db",
    "..%2f..%2fkeys%2fsigning.key",
    "/etc/passwd",
    "a" * 63,
    "A" * 64,
    "g" * 64,
    "0" * 64 + "\n",
    "0" * 64,
    "ab/" + "0" * 61,
    "\0" * 64,
    "é" * 64,
]


def _read(org: MachineClient, sha256: str, offset: int = 0) -> bytes:
    request = models_pb2.ReadBlobRequest(sha256=sha256, offset=offset)
    return b"".join(item.data for item in org.collect(org.models.ReadBlob, request))


@pytest.fixture
def reader(live: Live) -> MachineClient:
    return live.machine("reader", "auditor")


@pytest.mark.parametrize("sha256", ODD, ids=range(len(ODD)))
def test_names_that_are_no_digest(reader: MachineClient, sha256: str) -> None:
    with pytest.raises(NotFoundError):
        _read(reader, sha256)


def test_masters_and_stray_files_are_not_given_out(live: Live, reader: MachineClient) -> None:
    stray, size = live.store.blobs.put(b"a file that no row knows")
    hidden, length = live.store.blobs.put(b"a blob that is not public")
    with live.store.database.write() as session:
        session.add(Blob(sha256=hidden, nbytes=length, public=False, created_at=live.clock.now()))
    assert size
    for sha256 in (stray, hidden):
        with pytest.raises(NotFoundError):
            _read(reader, sha256)
    master = hashlib.sha256(model_tensors()["norm.weight"].astype("<f4").tobytes()).hexdigest()
    with live.store.database.read() as session:
        assert session.get_one(Blob, master).public is False
    with pytest.raises(NotFoundError):
        _read(reader, master)


def test_a_contribution_is_not_given_out(live: Live, reader: MachineClient) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    org.commit(begun.upload_id)
    for entry in manifest.tensors:
        with pytest.raises(NotFoundError):
            _read(reader, entry.sha256)


def test_what_a_release_lists_is_given_out_from_any_offset(reader: MachineClient) -> None:
    release = call(reader.models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL))
    for tensor in release.tensors:
        whole = _read(reader, tensor.sha256)
        assert hashlib.sha256(whole).hexdigest() == tensor.sha256
        assert _read(reader, tensor.sha256, 3) == whole[3:]
        assert _read(reader, tensor.sha256, len(whole)) == b""
        for offset in (-1, len(whole) + 1, 2**62):
            with pytest.raises(ConfigError) as caught:
                _read(reader, tensor.sha256, offset)
            assert caught.value.code == "blob.bad_offset"


def test_a_public_blob_that_is_gone_is_no_crash(live: Live, reader: MachineClient) -> None:
    release = call(reader.models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL))
    live.store.blobs.remove([release.tensors[0].sha256])
    with pytest.raises(ColdmergeError):
        _read(reader, release.tensors[0].sha256)
    _read(reader, release.tensors[1].sha256)
