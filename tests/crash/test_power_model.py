"""The model of a disk that the power-cut tests stand on."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.power import PAGE, Disk, File
from tests.crash.trace import Kind, Step, Trace, recording

ROOT = "/r"


class Writer:
    """Numbers steps and applies them."""

    def __init__(self) -> None:
        self.disk = Disk(Path(ROOT))
        self._count = 0

    def __call__(self, kind: Kind, path: str, thread: int = 1, **more: object) -> None:
        self._count += 1
        where = f"{ROOT}/{path}".rstrip("/")
        if "to" in more:
            more["to"] = f"{ROOT}/{more['to']}"
        self.disk.apply(Step(self._count, thread, 0.0, kind, where, **more))  # type: ignore[arg-type]

    def sync(self, path: str) -> None:
        """fsync of a file or folder."""
        self("begin", path)
        self("end", path)

    def left(self, folder: Path, luck: int | None = None) -> dict[str, bytes]:
        """What a power cut leaves."""
        shutil.rmtree(folder, ignore_errors=True)
        self.disk.materialize(folder, None if luck is None else random.Random(luck))
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def does() -> Writer:
    return Writer()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_only_what_was_synced_stays(does: Writer, out: Path) -> None:
    does("create", "a")
    does("write", "a", offset=0, data=b"old")
    does.sync("a")
    assert does.left(out) == {}, "its name is not durable"
    does.sync("")
    does("write", "a", offset=1, data=b"new")
    assert does.left(out) == {"a": b"old"}
    does.sync("a")
    assert does.left(out) == {"a": b"onew"}


def test_a_sync_covers_what_was_written_when_it_began(does: Writer, out: Path) -> None:
    does("create", "a")
    does.sync("")
    does("write", "a", offset=0, data=b"1")
    does("begin", "a", thread=1)
    does("write", "a", offset=1, data=b"2")
    does("end", "a", thread=1)
    assert does.left(out) == {"a": b"1"}


def test_a_rename_is_durable_with_its_folder(does: Writer, out: Path) -> None:
    for folder in ("x", "y"):
        does("mkdir", folder)
    does.sync("")
    does("create", "x/a")
    does("write", "x/a", offset=None, data=b"1")
    does.sync("x/a")
    does.sync("x")
    does("rename", "x/a", to="y/b")
    assert does.left(out) == {"x/a": b"1"}
    does.sync("y")
    assert does.left(out) == {"x/a": b"1", "y/b": b"1"}
    does.sync("x")
    assert does.left(out) == {"y/b": b"1"}


def test_an_unsynced_rename_may_be_half_done_and_never_loses_the_file(
    does: Writer, out: Path
) -> None:
    for folder in ("x", "y"):
        does("mkdir", folder)
    does("create", "x/a")
    for folder in ("", "x", "y"):
        does.sync(folder)
    does("rename", "x/a", to="y/b")
    found = {tuple(sorted(does.left(out, luck))) for luck in range(40)}
    assert found == {("x/a",), ("x/a", "y/b"), ("y/b",)}


def test_the_folder_that_a_file_left_is_not_synced_without_the_one_it_went_to(
    does: Writer, out: Path
) -> None:
    for folder in ("x", "y"):
        does("mkdir", folder)
    does("create", "x/a")
    for folder in ("", "x", "y"):
        does.sync(folder)
    does("rename", "x/a", to="y/b")
    does.sync("x")
    assert does.left(out) == {"y/b": b""}


def test_a_second_name_is_durable_with_its_folder(does: Writer, out: Path) -> None:
    does("create", "a")
    does.sync("")
    does("link", "a", to="b")
    assert does.left(out) == {"a": b""}
    does.sync("")
    assert does.left(out) == {"a": b"", "b": b""}


def test_what_is_under_way_survives_page_by_page(does: Writer, out: Path) -> None:
    does("create", "a")
    does.sync("")
    does("resize", "a", length=4 * PAGE)
    does.sync("a")
    does("write", "a", offset=10, data=b"1" * 3 * PAGE)
    found = {does.left(out, luck)["a"] for luck in range(60)}
    assert len(found) > 8
    assert all(len(content) == 4 * PAGE for content in found)
    assert all(content[11 : PAGE - 1].count(b"1") in (0, PAGE - 12) for content in found)


def test_cut_and_grown_files(does: Writer, out: Path) -> None:
    does("create", "a")
    does.sync("")
    does("write", "a", offset=0, data=b"12345")
    does("grow", "a", length=3)
    does("resize", "a", length=2)
    does("grow", "a", length=4)
    does.sync("a")
    assert does.left(out) == {"a": b"12\0\0"}


def test_removed_files_and_calls_elsewhere(does: Writer, out: Path) -> None:
    does("create", "a")
    does.sync("")
    does("remove", "a")
    assert does.left(out) == {"a": b""}
    does.sync("")
    assert does.left(out) == {}
    does("write", "a", offset=0, data=b"its descriptor was still open")
    does.disk.apply(Step(9, 1, 0.0, "create", "/elsewhere"))
    assert does.left(out) == {}


def test_a_disk_begins_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "known" / "x").mkdir(parents=True)
    (tmp_path / "known" / "x" / "a").write_bytes(b"1")
    disk = Disk(Path(ROOT), tmp_path / "known")
    disk.materialize(tmp_path / "out")
    assert (tmp_path / "out" / "x" / "a").read_bytes() == b"1"


def test_the_lines_of_two_threads_that_overlap() -> None:
    trace = Trace()
    path = "".join(f"\\x{byte:02x}" for byte in b"/r/a")
    lines = (
        f"1 10.0 fsync(3<{path}> <unfinished ...>",
        f'2 10.1 pwrite64(4<{path}>, "\\x61\\x62", 2, 7) = 2 <0.050000>',
        f'2 10.2 openat(AT_FDCWD<{path}>, "{path}", O_RDONLY|O_CREAT, 0600) = -1 EACCES (No) <0.1>',
        "1 10.3 <... fsync resumed>) = 0 <0.300000>",
        "1 10.4 +++ killed by SIGKILL +++",
    )
    steps = [step for line in lines for step in trace.feed(line)]
    assert [(step.kind, step.thread, step.path) for step in steps] == [
        ("begin", 1, "/r/a"),
        ("write", 2, "/r/a"),
        ("end", 1, "/r/a"),
    ]
    assert (steps[1].offset, steps[1].data, round(steps[1].at, 3)) == (7, b"ab", 10.15)


PROGRAM = """
import os, sys
os.chdir(sys.argv[1])
root = sys.argv[1]
fd = os.open(f"{root}/a", os.O_RDWR | os.O_CREAT, 0o600)
os.write(fd, b"one"); os.write(fd, b"two"); os.pwrite(fd, b"T", 0)
os.posix_fallocate(fd, 0, 10); os.ftruncate(fd, 8); os.fsync(fd)
os.mkdir(f"{root}/x"); os.rename(f"{root}/a", f"{root}/x/b")
with open(f"{root}/log", "a") as log:
    log.write("1"); log.flush(); log.write("2")
os.unlink(f"{root}/log")
top = os.open(root, os.O_RDONLY); os.fsync(top)
inner = os.open(f"{root}/x", os.O_RDONLY); os.fsync(inner)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_recorded_program(tmp_path: Path) -> None:
    log, root = tmp_path / "log", tmp_path / "root"
    root.mkdir()
    command = [*recording(log), sys.executable, "-c", PROGRAM, str(root)]
    subprocess.run(command, check=True)
    disk = Disk(root)
    disk.follow(Trace().read(log))
    disk.materialize(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert (tmp_path / "out" / "x" / "b").read_bytes() == b"Tnetwo\0\0"
    assert isinstance(disk.top.now["x"], type(disk.top))
    assert not any(isinstance(node, File) for node in disk.top.now.values())
