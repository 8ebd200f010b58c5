"""Blobs and task vectors in a real S3 server, which may be wrong, gone or forgetful."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from obstore.exceptions import PermissionDeniedError

from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    ResourceError,
    UnavailableError,
)
from coldmerge_coordinator.config import CoordinatorConfig
from coldmerge_coordinator.store import Store, bucket
from coldmerge_coordinator.store.bucket import Bucket, our_error
from coldmerge_coordinator.store.s3_blobs import READ_AHEAD, RemoteBlob
from coldmerge_coordinator.worker import TERM, Worker
from tests import s3
from tests.coordinator.conftest import Bench, make_store
from tests.s3 import S3Server
from tests.support import FixedClock

DATA = b"abcdefgh" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
KEY = f"blobs/{SHA256[:2]}/{SHA256}"


@pytest.fixture
def prefix() -> str:
    return s3.new_prefix()


@pytest.fixture
def open_store(prefix: str, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens coordinators that share the bucket, and no folder."""
    opened: list[Store] = []

    def run(name: str = "hub", **keys: object) -> Store:
        values = {"federation": "fed", **s3.server().config(prefix), **keys}
        opened.append(Store.create(tmp_path / name, CoordinatorConfig.model_validate(values)))
        return opened[-1]

    yield run
    for store in opened:
        store.close()


@pytest.fixture
def own_server() -> Iterator[S3Server]:
    """A server that a test may kill."""
    server = S3Server()
    yield server
    server.close()


def test_what_one_host_wrote_another_reads(open_store: Callable[..., Store]) -> None:
    a, b = open_store("a"), open_store("b")
    assert a.blobs.put(DATA) == (SHA256, len(DATA))
    assert b.blobs.read(SHA256, 8, 16) == b"abcdefgh"
    assert b"".join(b.blobs.chunks(SHA256)) == DATA
    values = np.arange(100, dtype="<f4")
    sha256, _ = a.blobs.put(values.tobytes())
    assert b.blobs.block(sha256, "F32", 10, 20).tolist() == values[10:20].tolist()
    assert b.blobs.stored([SHA256, "0" * 64]) == {SHA256: len(DATA)}
    assert [found.sha256 for found in b.blobs.listed(SHA256[:2])] == [SHA256]


def test_a_blob_is_streamed_past_the_cache(open_store: Callable[..., Store]) -> None:
    a, b = open_store("a"), open_store("b")
    data = np.random.default_rng(1).bytes(READ_AHEAD + 5)
    sha256, _ = a.blobs.put(data)
    remote = b.blobs.stream(sha256)
    assert isinstance(remote, RemoteBlob)
    steps = range(0, remote.size, 2**20)
    read = [remote.read(start, min(start + 2**20, remote.size)) for start in steps]
    remote.close()
    assert b"".join(map(bytes, read)) == data
    assert not list((b.folder / "cache").glob("??/*"))
    assert not isinstance(a.blobs.stream(sha256), RemoteBlob), "a has it in its cache"


def test_large_blobs_go_in_parts(open_store: Callable[..., Store], prefix: str) -> None:
    a, b = open_store("a"), open_store("b")
    data = np.random.default_rng(2).bytes(20 * 2**20)
    sha256, _ = a.blobs.put(data)
    meta = s3.server().client(prefix).head(f"blobs/{sha256[:2]}/{sha256}")
    assert (meta["e_tag"] or "").endswith('-3"'), "three parts"
    assert b"".join(b.blobs.chunks(sha256)) == data


def test_the_cache_keeps_to_its_limit(open_store: Callable[..., Store]) -> None:
    a = open_store("a", cache_bytes=100_000)
    names = [a.blobs.put(bytes([n]) * 30_000)[0] for n in range(10)]
    kept = list((a.folder / "cache").glob("??/*"))
    assert 1 <= len(kept) <= 4
    assert all(a.blobs.read(name, 0, 30_000) == bytes([n]) * 30_000 for n, name in enumerate(names))


def test_a_transfer_beats_and_may_be_ended(
    open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "BEAT_SECONDS", 0.001)
    store, other = open_store("a"), open_store("b")
    heard: list[str] = []
    data = np.random.default_rng(3).bytes(20 * 2**20)
    with store.blobs.watched(lambda: heard.append("put")).writer() as writer:
        writer.write(data)
        sha256, _ = writer.commit()
    assert "put" in heard
    heard.clear()

    def enough() -> None:
        heard.append("fetched")
        if len(heard) == 3:
            raise UnavailableError("test.enough", "Enough.", hint="None.")

    with pytest.raises(UnavailableError) as caught:
        other.blobs.watched(enough).open(sha256)
    assert caught.value.code == "test.enough"
    assert len(heard) == 3
    assert not list((other.blobs.folder / "incoming").iterdir())
    heard.clear()
    with other.blobs.watched(lambda: heard.append("fetched")).open(sha256) as file:
        assert bytes(file.read(0, len(data))) == data
    assert len(heard) >= 10
    heard.clear()
    other.blobs.open(sha256).close()
    assert heard == [], "others of the same blobs are not watched"


def test_a_slow_fetch_keeps_the_lease_of_its_merge(
    prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "a", **s3.server().config(prefix))
    bench = Bench(store, FixedClock(), tmp_path)
    bench.add_model({"w": np.zeros(4 * 2**20, np.float32)})  # 16 MiB
    round_id = bench.open_round()
    bench.contribute(round_id, "org", {"w": np.full(4 * 2**20, 0.5, np.float32)})
    shutil.rmtree(bench.store.blobs.folder)
    (bench.store.blobs.folder / "incoming").mkdir(parents=True)
    (bench.store.blobs.folder / "payloads").mkdir()
    chunks, tried = Bucket.chunks, []

    def slowly(self: Bucket, key: str) -> Iterator[bytes]:
        for data in chunks(self, key):
            bench.clock.advance(timedelta(seconds=10))
            if key.startswith("blobs/"):
                tried.append(Worker(bench.store, bench.clock, holder="idle")._take(round_id))
            yield data

    monkeypatch.setattr(Bucket, "chunks", slowly)
    assert Worker(bench.store, bench.clock, holder="slow").run_once()
    assert len(tried) * timedelta(seconds=10) > 3 * TERM
    assert set(tried) == {None}
    assert bench.round(round_id).state == "PUBLISHED"
    store.close()


def test_an_unknown_blob(open_store: Callable[..., Store]) -> None:
    a = open_store("a")
    for ask in (a.blobs.open, a.blobs.stream):
        with pytest.raises(NotFoundError) as caught:
            ask("0" * 64)
        assert caught.value.code == "blob.unknown"
    with pytest.raises(NotFoundError):
        a.blobs.open("../../etc/passwd")


def test_an_object_that_was_cut_is_noticed(open_store: Callable[..., Store], prefix: str) -> None:
    a, b = open_store("a"), open_store("b")
    a.blobs.put(DATA)
    whole = b.blobs.stream(SHA256)
    s3.server().client(prefix).put(KEY, DATA[:100])
    with pytest.raises(IntegrityError) as caught:
        b.blobs.read(SHA256, 0, 8)
    assert caught.value.code == "blob.corrupt"
    with pytest.raises(IntegrityError) as caught:
        whole.read(0, len(DATA))
    assert caught.value.code == "s3.truncated"
    assert not list((b.folder / "cache").glob("??/*"))
    b.blobs.put(DATA)
    (a.folder / "cache" / SHA256[:2] / SHA256).unlink()
    assert a.blobs.read(SHA256, 0, len(DATA)) == DATA, "who has the bytes puts them right"


def test_removed_blobs_and_payloads_are_gone(open_store: Callable[..., Store]) -> None:
    a = open_store("a")
    a.blobs.put(DATA)
    a.payloads.add("contribution-1.safetensors", DATA)
    assert a.payloads.local("contribution-1.safetensors").read_bytes() == DATA
    a.blobs.remove([SHA256, "0" * 64])
    a.payloads.remove(["contribution-1.safetensors", "contribution-2.safetensors"])
    assert a.blobs.stored([SHA256]) == {}
    assert not a.payloads.exists("contribution-1.safetensors")
    assert not a.payloads.local("contribution-1.safetensors").exists()
    with pytest.raises(NotFoundError):
        a.blobs.open(SHA256)


def test_the_server_refuses_who_has_no_key(prefix: str) -> None:
    with pytest.raises(PermissionDeniedError):
        s3.server().client(prefix, skip_signature=True).get("x")
    with pytest.raises(PermissionDeniedError):
        s3.server().client(prefix, skip_signature=True).put("x", b"1")


@pytest.mark.parametrize("which", ["access_key_file", "secret_key_file"])
def test_wrong_keys_are_said_at_the_start(
    open_store: Callable[..., Store], prefix: str, tmp_path: Path, which: str
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong-secret-value\n")
    settings = {**s3.server().config(prefix)["s3"], which: str(wrong)}
    folder = open_store("a", s3=settings).folder
    with pytest.raises(ConfigError) as caught:
        Store.open(folder)
    assert caught.value.code == "s3.denied"
    assert "wrong-secret-value" not in str(caught.value)
    wrong.unlink()
    with pytest.raises(ConfigError) as caught:
        Store.open(folder)
    assert caught.value.code == "s3.key_unreadable"


def test_a_missing_bucket_is_said_at_the_start(open_store: Callable[..., Store]) -> None:
    folder = open_store("a", blobs="s3://no-such-bucket/hub").folder
    with pytest.raises(ConfigError) as caught:
        Store.open(folder)
    assert caught.value.code == "s3.no_bucket"


def test_keys_may_come_from_the_environment(
    open_store: Callable[..., Store], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET)
    settings = {"endpoint": s3.server().endpoint, "allow_http": True}
    assert open_store("a", s3=settings).blobs.put(DATA) == (SHA256, len(DATA))


def test_a_server_that_dies_in_mid_commit_acknowledges_nothing(
    own_server: S3Server, tmp_path: Path
) -> None:
    values = {"federation": "fed", **own_server.config()}
    store = Store.create(tmp_path / "hub", CoordinatorConfig.model_validate(values))
    data = np.random.default_rng(3).bytes(64 * 2**20)
    failed: list[ColdmergeError] = []
    began = threading.Event()

    def commit() -> None:
        with store.blobs.writer() as writer:
            writer.write(data)
            began.set()
            try:
                writer.commit()
            except ColdmergeError as error:
                failed.append(error)

    thread = threading.Thread(target=commit)
    thread.start()
    began.wait()
    own_server.kill()
    thread.join()
    assert [type(error) for error in failed] == [UnavailableError]
    assert not list((store.folder / "cache").glob("??/*")), "nothing says that it is stored"
    with pytest.raises(UnavailableError):
        Store.open(store.folder)
    own_server.start()
    sha256, _ = store.blobs.put(data)
    assert store.blobs.stored([sha256]) == {sha256: len(data)}
    store.close()


@pytest.mark.parametrize(
    ("kind", "text", "expected", "code"),
    [
        ("GenericError", "status code: 507 Insufficient Storage", ResourceError, "s3.full"),
        ("GenericError", "409: <Code>QuotaExceeded</Code>", ResourceError, "s3.full"),
        ("GenericError", "status code: 503: <Code>SlowDown</Code>", UnavailableError, None),
        ("GenericError", "error sending request", UnavailableError, "s3.unavailable"),
        ("PermissionDeniedError", "status code: 403 Forbidden", ConfigError, "s3.denied"),
        ("FileNotFoundError", "404: <Code>NoSuchBucket</Code>", ConfigError, "s3.no_bucket"),
        ("FileNotFoundError", "status code: 404 Not Found", NotFoundError, "s3.no_object"),
    ],
)
def test_what_a_servers_answer_means(
    kind: str, text: str, expected: type[ColdmergeError], code: str | None
) -> None:
    error = our_error("key", kind, text)
    assert type(error) is expected
    assert code is None or error.code == code
