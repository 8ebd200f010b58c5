"""The file system calls of a program, as strace writes them down, or makes them fail."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,fsync,"
    "fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,"
    "unlinkat,mkdir,mkdirat,rmdir,copy_file_range,sendfile"
)
Kind = Literal[
    "create", "mkdir", "write", "resize", "grow", "remove", "rename", "link", "begin", "end"
]

_LINE = re.compile(r"(?P<thread>\d+) +(?P<at>\d+\.\d+) (?P<rest>.*)")
_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(?P<rest>.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<answer>-?\w+)")
_TOOK = re.compile(r"<(\d+\.\d+)>$")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_OPEN_FILE = re.compile(r"^-?\d+<((?:\\x[0-9a-f]{2})*)>")


def recording(log: Path, *inject: str) -> tuple[str, ...]:
    """The command line that goes in front of a program to be recorded."""
    flags = ("strace", "-f", "-y", "-xx", "-ttt", "-T", "-s", "10000000", "--seccomp-bpf")
    faults = [word for each in inject for word in ("-e", f"inject={each}")]
    return (*flags, "-o", str(log), "-e", f"trace={CALLS}", *faults)


@contextmanager
def faults(pid: int, call: str, fault: str, *more: str) -> Iterator[None]:
    """Calls of a running process fail, or kill it: strace's words for which, and how."""
    command = ["strace", "-f", "-p", str(pid), *more]
    tracer = subprocess.Popen(
        [*command, "-e", f"trace={call}", "-e", f"inject={call}:{fault}"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    assert b"attached" in first, first
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()


@dataclass(frozen=True)
class Step:
    """One call that changed files; `begin` and `end` are the two ends of an fsync.

    `at` is the Unix time at which it was over; `offset` is None where bytes are appended.
    """

    number: int
    thread: int
    at: float
    kind: Kind
    path: str
    to: str = ""
    offset: int | None = None
    data: bytes = b""
    length: int = 0


class Trace:
    """Steps out of strace's lines, in the order in which they were over."""

    def __init__(self) -> None:
        self._unfinished: dict[int, tuple[str, float]] = {}
        self._offsets: dict[str, int] = {}
        self._number = 0

    def read(self, path: Path) -> Iterator[Step]:
        """All steps of a log."""
        with path.open() as lines:
            for line in lines:
                yield from self.feed(line)

    def feed(self, line: str) -> Iterator[Step]:
        """The steps of one line: none, one or two."""
        found = _LINE.match(line.rstrip("\n"))
        if found is None or found["rest"][0] in "+-":
            return
        thread, at, rest = int(found["thread"]), float(found["at"]), found["rest"]
        if rest.endswith(_UNFINISHED):
            rest = rest.removesuffix(_UNFINISHED)
            self._unfinished[thread] = (rest, at)
            yield from self._begin(thread, at, rest)
            return
        if resumed := _RESUMED.match(rest):
            begun, _ = self._unfinished.pop(thread)
            rest = begun + resumed["rest"]
        else:
            took = _TOOK.search(rest)
            yield from self._begin(thread, at, rest)
            at += float(took[1]) if took else 0.0
        if (call := _CALL.match(rest)) and not call["answer"].startswith(("-", "?")):
            yield from self._done(thread, at, call["name"], call["arguments"], call["answer"])

    def _begin(self, thread: int, at: float, rest: str) -> Iterator[Step]:
        if rest.startswith(("fsync(", "fdatasync(")):
            yield self._step(thread, at, "begin", _opened(rest.partition("(")[2]))

    def _step(self, thread: int, at: float, kind: Kind, path: str, **more: object) -> Step:
        self._number += 1
        return Step(self._number, thread, at, kind, path, **more)  # type: ignore[arg-type]

    def _done(
        self, thread: int, at: float, name: str, arguments: str, answer: str
    ) -> Iterator[Step]:
        handler: Callable[..., Iterator[tuple[Kind, str, dict[str, object]]]]
        handler = getattr(self, f"_{name}")
        for kind, path, more in handler(arguments, int(answer, 0)):
            yield self._step(thread, at, kind, path, **more)

    def _openat(
        self, arguments: str, _answer: int
    ) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        (path,) = _strings(arguments)
        flags = arguments.rpartition('"')[2]
        if "O_CREAT" in flags:
            yield "create", path, {}
        if "O_TRUNC" in flags:
            yield "resize", path, {"length": 0}
        self._offsets[path] = -1 if "O_APPEND" in flags else 0

    def _write(self, arguments: str, answer: int) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        path = _opened(arguments)
        if not path.startswith("/"):
            return
        (data,) = _raw(arguments.partition(">")[2])
        at = self._offsets.get(path, 0)
        offset = None if at < 0 else at
        self._offsets[path] = at if at < 0 else at + answer
        yield "write", path, {"offset": offset, "data": data[:answer]}

    def _pwrite64(
        self, arguments: str, answer: int
    ) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        (data,) = _raw(arguments.partition(">")[2])
        offset = int(arguments.rpartition(", ")[2])
        yield "write", _opened(arguments), {"offset": offset, "data": data[:answer]}

    def _ftruncate(
        self, arguments: str, _answer: int
    ) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        length = int(arguments.rpartition(", ")[2])
        yield "resize", _opened(arguments), {"length": length}

    def _fallocate(
        self, arguments: str, _answer: int
    ) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        *_, mode, offset, length = arguments.split(", ")
        assert mode == "0", arguments
        yield "grow", _opened(arguments), {"length": int(offset) + int(length)}

    def _fsync(self, arguments: str, _answer: int) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        yield "end", _opened(arguments), {}

    def _rename(
        self, arguments: str, _answer: int
    ) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        path, to = _strings(arguments)
        self._offsets[to] = self._offsets.pop(path, 0)
        yield "rename", path, {"to": to}

    def _link(self, arguments: str, _answer: int) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        path, to = _strings(arguments)
        yield "link", path, {"to": to}

    def _unlink(
        self, arguments: str, _answer: int
    ) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        (path,) = _strings(arguments)
        yield "remove", path, {}

    def _mkdir(self, arguments: str, _answer: int) -> Iterator[tuple[Kind, str, dict[str, object]]]:
        (path,) = _strings(arguments)
        yield "mkdir", path, {}

    _fdatasync = _fsync
    _renameat = _renameat2 = _rename
    _linkat = _link
    _unlinkat = _rmdir = _unlink
    _mkdirat = _mkdir


def _opened(arguments: str) -> str:
    """The path behind the file descriptor that comes first."""
    found = _OPEN_FILE.match(arguments)
    return _decoded(found[1]).decode() if found else ""


def _raw(arguments: str) -> list[bytes]:
    return [_decoded(each) for each in _BYTES.findall(arguments)]


def _strings(arguments: str) -> list[str]:
    return [each.decode() for each in _raw(arguments)]


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
