"""Reading models, releases and candidates; watching releases appear."""

from __future__ import annotations

import hashlib
import threading

import pytest

from coldmerge.core.clock import SystemClock
from coldmerge.core.documents import ReleaseRecord, verify
from coldmerge.core.errors import NotFoundError, UnavailableError
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.convert import content_of, signed_from_proto
from coldmerge.wire.v1 import models_pb2
from coldmerge_coordinator import worker
from tests.harness import MODEL, Live, deltas, model_tensors


def _release(live: Live, **which: object) -> models_pb2.Release:
    org = live.machine(f"r{len(live._channels)}", "evaluator")
    request = models_pb2.GetReleaseRequest(model=MODEL, **which)  # type: ignore[arg-type]
    answer: models_pb2.Release = call(org.models.GetRelease, request)
    return answer


def _publish(live: Live, seed: int = 1) -> None:
    live.machine(f"c{seed}").contribute(live.open_round(min_contributions=1), deltas(seed))
    assert worker.run_once(live.store, SystemClock())


def test_models_with_their_latest_release(live: Live) -> None:
    org = live.machine("a")
    found = call(org.models.ListModels, models_pb2.ListModelsRequest()).models
    assert [(m.name, m.latest_number, list(m.private_patterns)) for m in found] == [
        (MODEL, 0, ["classifier.*"])
    ]


def test_a_release_by_number_digest_and_as_latest(live: Live) -> None:
    first = _release(live, number=0)
    assert first == _release(live, latest=True) == _release(live)
    assert first == _release(live, content_digest=first.content_digest)
    key = live.store.signer.key.public_key()
    record = verify(signed_from_proto(first.record), ReleaseRecord, key)
    content = content_of(first)
    assert record.content_digest == content.digest == first.content_digest
    assert [entry.name for entry in content.tensors] == sorted(model_tensors())
    assert [entry.path for entry in content.files] == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize("which", [{"number": 9}, {"number": -1}, {"content_digest": "0" * 64}])
def test_releases_that_do_not_exist(live: Live, which: dict[str, object]) -> None:
    with pytest.raises(NotFoundError):
        _release(live, **which)


def test_models_that_do_not_exist(live: Live) -> None:
    org = live.machine("a")
    request = models_pb2.ListReleasesRequest(model="ghost")
    with pytest.raises(NotFoundError):
        call(org.models.ListReleases, request)
    with pytest.raises(NotFoundError):
        org.collect(org.models.WatchReleases, models_pb2.WatchReleasesRequest(model="ghost"))


def test_releases_are_listed_without_content(live: Live) -> None:
    _publish(live)
    org = live.machine("a")
    found = call(org.models.ListReleases, models_pb2.ListReleasesRequest(model=MODEL)).releases
    assert [release.number for release in found] == [0, 1]
    assert not any(release.tensors or release.files for release in found)


def test_files_are_blobs_too(live: Live) -> None:
    release, org = _release(live), live.machine("a")
    file = release.files[0]
    request = models_pb2.ReadBlobRequest(sha256=file.sha256)
    data = b"".join(part.data for part in org.collect(org.models.ReadBlob, request))
    assert hashlib.sha256(data).hexdigest() == file.sha256
    assert data == b'{"model_type": "test"}'


def test_a_candidate_is_found_by_its_digest(live: Live) -> None:
    org = live.machine("a")
    org.contribute(live.open_round(min_contributions=1, gate={}), deltas())
    worker.run_once(live.store, SystemClock())
    from coldmerge_coordinator.store import rounds

    with live.store.database.read() as session:
        newest = rounds.newest_round(session, MODEL)
    assert newest is not None
    assert newest.candidate_digest is not None
    candidate = _release(live, content_digest=newest.candidate_digest)
    assert content_of(candidate).digest == newest.candidate_digest
    assert not candidate.HasField("record")
    changed = [tensor.sha256 for tensor in candidate.tensors if tensor.name == "layer.weight"]
    request = models_pb2.ReadBlobRequest(sha256=changed[0])
    assert sum(len(part.data) for part in org.collect(org.models.ReadBlob, request)) == 64


def test_a_watch_shows_old_and_new_releases(live: Live) -> None:
    org = live.machine("a")
    request = models_pb2.WatchReleasesRequest(model=MODEL, after_number=-1)
    stream = server_stream(org.models.WatchReleases, request, deadline=30)
    assert next(stream).number == 0
    publishing = threading.Thread(target=_publish, args=(live,))
    publishing.start()
    assert next(stream).number == 1
    publishing.join()
    later = models_pb2.WatchReleasesRequest(model=MODEL, after_number=0)
    assert next(server_stream(org.models.WatchReleases, later, deadline=30)).number == 1


def test_a_stopping_coordinator_ends_its_streams(live: Live) -> None:
    org = live.machine("a")
    request = models_pb2.WatchReleasesRequest(model=MODEL, after_number=-1)
    stream = server_stream(org.models.WatchReleases, request, deadline=30)
    next(stream)
    live._channels.clear()
    live.stop()
    with pytest.raises(UnavailableError) as caught:
        next(stream)
    assert caught.value.code == "service.stopping"
    org.channel.close()
    live.start()
