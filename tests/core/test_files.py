from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from coldmerge.core.errors import IntegrityError, ResourceError
from coldmerge.core.files import PositionalFile, preallocate, raise_if_full, write_all


def test_reads_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    file = PositionalFile(tmp_path / "f")
    assert file.size == 100
    assert bytes(file.read(10, 20)) == bytes(range(10, 20))


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    file = PositionalFile(tmp_path / "f")
    os.truncate(tmp_path / "f", 50)
    with pytest.raises(IntegrityError) as caught:
        file.read(40, 60)
    assert caught.value.code == "file.truncated"


def test_a_full_disk_is_our_error() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(ResourceError) as caught:
            write_all(fd, b"x", 0)
    finally:
        os.close(fd)
    assert caught.value.code == "disk.full"
    assert caught.value.exit_status == 8


def test_more_than_any_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises((ResourceError, OSError)):
            preallocate(fd, 2**60)
    finally:
        os.close(fd)


def test_other_errors_stay_what_they_are() -> None:
    raise_if_full(OSError(errno.EACCES, "no"))
