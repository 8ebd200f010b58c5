"""Blobs appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from coldmerge.core.errors import IntegrityError, NotFoundError, ResourceError
from coldmerge_coordinator.store.blobs import BlobStore, BlobWriter

DATA = b"abcdefgh" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files(blobs: BlobStore) -> list[str]:
    """Every file below the folder."""
    found = (path for path in blobs.folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(blobs.folder)) for path in found)


def test_a_blob_is_found_by_its_hash(blobs: BlobStore) -> None:
    with blobs.writer() as writer:
        writer.write(DATA[:100])
        writer.write(memoryview(DATA)[100:])
        assert writer.commit() == (SHA256, len(DATA))
    assert files(blobs) == [f"{SHA256[:2]}/{SHA256}"]
    assert blobs.path(SHA256).exists()
    assert blobs.path(SHA256).read_bytes() == DATA
    assert blobs.read(SHA256, 8, 16) == b"abcdefgh"
    assert b"".join(blobs.chunks(SHA256)) == DATA


def test_the_same_bytes_are_kept_once(blobs: BlobStore) -> None:
    blobs.put(DATA)
    inode = blobs.path(SHA256).stat().st_ino
    assert blobs.put(DATA) == (SHA256, len(DATA))
    assert blobs.path(SHA256).stat().st_ino == inode
    assert files(blobs) == [f"{SHA256[:2]}/{SHA256}"]


def test_the_empty_blob(blobs: BlobStore) -> None:
    sha256, nbytes = blobs.put(b"")
    assert (sha256, nbytes) == (hashlib.sha256(b"").hexdigest(), 0)
    assert list(blobs.chunks(sha256)) == []


def test_a_file_is_copied_in(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(DATA)
    assert blobs.put_file(tmp_path / "config.json") == (SHA256, len(DATA))


def test_what_is_not_committed_is_removed(blobs: BlobStore) -> None:
    with blobs.writer() as writer:
        writer.write(DATA)
    with pytest.raises(TypeError), blobs.writer() as writer:
        writer.write("text")  # type: ignore[arg-type]
    assert files(blobs) == []


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_blocks_are_float32(blobs: BlobStore, dtype: str) -> None:
    kind = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
    values = np.arange(1000, dtype=np.float32).astype(kind[dtype])
    sha256, _ = blobs.put(values.tobytes())
    block = blobs.block(sha256, dtype, 100, 200)
    assert block.dtype == np.float32
    assert np.array_equal(block, values[100:200].astype(np.float32))


@pytest.mark.parametrize("name", ["", "0" * 63, "0" * 65, "A" * 64, "../../etc/passwd", "0" * 64])
def test_unknown_blobs(blobs: BlobStore, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        blobs.open(name)
    assert caught.value.code == "blob.unknown"


def test_a_short_blob_is_noticed(blobs: BlobStore) -> None:
    blobs.put(DATA)
    with pytest.raises(IntegrityError):
        blobs.read(SHA256, 0, len(DATA) + 1)


def test_a_truncated_blob_is_replaced_by_a_whole_one(blobs: BlobStore) -> None:
    blobs.put(DATA)
    blobs.path(SHA256).write_bytes(DATA[:10])
    blobs.put(DATA)
    assert blobs.path(SHA256).read_bytes() == DATA


def test_many_writers_of_the_same_bytes(blobs: BlobStore) -> None:
    threads = [threading.Thread(target=blobs.put, args=(DATA,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(blobs) == [f"{SHA256[:2]}/{SHA256}"]
    assert blobs.path(SHA256).read_bytes() == DATA


KILLED = """
import os, signal, sys
from pathlib import Path
from coldmerge_coordinator.store.blobs import BlobStore

def die_before(call):
    count = 0
    def wrapped(real):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return run
    for name in ("open", "pwrite", "fsync", "mkdir", "rename", "close", "unlink"):
        setattr(os, name, wrapped(getattr(os, name)))

for call in range(1, 30):
    blobs = BlobStore(Path(sys.argv[1]) / str(call))
    if not (child := os.fork()):
        die_before(call)
        blobs.put(b"abcdefgh" * 1000)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(call)
        break
"""


def test_killed_at_any_call_a_blob_is_whole_or_absent(tmp_path: Path) -> None:
    """kill -9 before each of the system calls that a commit makes, one after the other."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    undisturbed = int(done.stdout)
    assert undisturbed > 5
    present = []
    for call in range(1, undisturbed + 1):
        blobs = BlobStore(tmp_path / str(call))
        present.append(blobs.path(SHA256).exists())
        if present[-1]:
            assert blobs.path(SHA256).read_bytes() == DATA
        assert blobs.put(DATA) == (SHA256, len(DATA))
        assert blobs.path(SHA256).read_bytes() == DATA
    assert present == sorted(present)  # absent until the rename, whole from then on
    assert not present[0]
    assert present[-1]


def test_what_a_crash_leaves_is_swept_once_it_is_old(blobs: BlobStore) -> None:
    crashed = BlobWriter(blobs.folder, set())
    crashed.write(DATA)
    left = blobs.folder / files(blobs)[0]
    assert not blobs.path(SHA256).exists()
    assert blobs.sweep(older_than=left.stat().st_mtime) == 0
    assert blobs.sweep(older_than=left.stat().st_mtime + 1) == 1
    assert files(blobs) == []
    crashed.close()


def test_a_full_disk_is_said_and_leaves_nothing(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: object, _offset: int) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError) as caught:
        blobs.put(DATA)
    assert caught.value.code == "disk.full"
    assert files(blobs) == []
