"""A model of a disk that forgets what was not synced, to see what a power cut leaves.

It follows the calls of a program (see `tests.crash.trace`) and knows for each file what was
written and what an fsync has made durable since, and for each folder the same of its
entries. A file's fsync says nothing of its name; a name is durable when its folder was
synced. What an fsync covers is what had been written when it began.

`materialize` writes down what the disk may hold: only what is durable, or, given a random
generator, also some of what was under way: pages and entries in any combination. Only a rename
is never half done to the loss of the file: no file system that is in use does that.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.trace import Step

PAGE = 4096
Changes = dict[str, "File | Folder | None"]


@dataclass
class File:
    """Bytes, and how much of them is durable."""

    now: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, int, bytes | int]] = field(default_factory=list)
    """(number of the step, offset, bytes), or (number, -1, length) where the length changed."""
    synced_to: int = -1

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Bytes at an offset."""
        _put(self.now, offset, data)
        self.pending.append((number, offset, data))

    def resize(self, number: int, length: int) -> None:
        """Cut, or grow with zeros."""
        _resize(self.now, length)
        self.pending.append((number, -1, length))

    def sync(self, up_to: int) -> None:
        """What came before step `up_to` is durable."""
        covered = [each for each in self.pending if each[0] < up_to]
        self.durable = bytes(_applied(self.durable, covered))
        self.pending = [each for each in self.pending if each[0] >= up_to]

    def left(self, draw: random.Random | None) -> bytes:
        """What a power cut may leave."""
        if draw is None:
            return self.durable
        kept = [part for each in self.pending for part in _pieces(each) if draw.random() < 0.5]
        return bytes(_applied(self.durable, kept))


@dataclass
class Folder:
    """Entries, and how many of them are durable."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[int, float, Changes]] = field(default_factory=list)
    """(number of the step, how likely it survives unsynced, what it changes)."""

    def change(self, number: int, changes: Changes, odds: float = 0.5) -> None:
        """Entries that appear, change or go (None), in one step."""
        _change(self.now, changes)
        self.pending.append((number, odds, changes))

    def sync(self, up_to: int) -> None:
        """What came before step `up_to` is durable."""
        for number, _, changes in self.pending:
            if number < up_to:
                _change(self.durable, changes)
        self.pending = [each for each in self.pending if each[0] >= up_to]

    def left(self, luck: dict[int, float]) -> dict[str, File | Folder]:
        """The entries that a power cut may leave; `luck` is in [0, 1) for each step."""
        found = dict(self.durable)
        for number, odds, changes in self.pending:
            if luck.get(number, 1.0) < odds:
                _change(found, changes)
        return found


class Disk:
    """All below `root`. What is there at the beginning is durable."""

    def __init__(self, root: Path, known: Path | None = None) -> None:
        self._root = root
        self.top = _read(known) if known is not None else Folder()
        self._begun: dict[int, int] = {}
        self._moves: list[tuple[int, Folder, Folder]] = []
        self._steps = 0

    def follow(self, steps: Iterable[Step]) -> None:
        """Apply steps in order."""
        for step in steps:
            self.apply(step)

    def apply(self, step: Step) -> None:
        """Apply one step; what lies outside of the root is left alone."""
        self._steps = step.number
        if self._inside(step.path) or (step.to and self._inside(step.to)):
            getattr(self, f"_{step.kind}")(step)

    def _inside(self, path: str) -> bool:
        return Path(path).is_relative_to(self._root)

    def _at(self, path: str) -> tuple[Folder, str]:
        """The folder of a path, and the name in it."""
        *above, name = Path(path).relative_to(self._root).parts
        folder = self.top
        for part in above:
            found = folder.now[part]
            assert isinstance(found, Folder), path
            folder = found
        return folder, name

    def _node(self, path: str) -> File | Folder | None:
        if Path(path) == self._root:
            return self.top
        folder, name = self._at(path)
        return folder.now.get(name)

    def _file(self, path: str) -> File | None:
        found = self._node(path)
        assert not isinstance(found, Folder)
        return found

    def _create(self, step: Step) -> None:
        folder, name = self._at(step.path)
        if name not in folder.now:
            folder.change(step.number, {name: File()})

    def _mkdir(self, step: Step) -> None:
        if Path(step.path) != self._root:
            folder, name = self._at(step.path)
            folder.change(step.number, {name: Folder()})

    def _write(self, step: Step) -> None:
        if (file := self._file(step.path)) is not None:
            offset = len(file.now) if step.offset is None else step.offset
            file.write(step.number, offset, step.data)

    def _resize(self, step: Step) -> None:
        if (file := self._file(step.path)) is not None:
            file.resize(step.number, step.length)

    def _grow(self, step: Step) -> None:
        if (file := self._file(step.path)) is not None and step.length > len(file.now):
            file.resize(step.number, step.length)

    def _remove(self, step: Step) -> None:
        folder, name = self._at(step.path)
        folder.change(step.number, {name: None})

    def _rename(self, step: Step) -> None:
        source, name = self._at(step.path)
        target, to = self._at(step.to)
        moved = source.now[name]
        if source is target:
            source.change(step.number, {name: None, to: moved})
        else:
            target.change(step.number, {to: moved}, odds=2 / 3)
            source.change(step.number, {name: None}, odds=1 / 3)
            self._moves.append((step.number, source, target))

    def _link(self, step: Step) -> None:
        source, name = self._at(step.path)
        target, to = self._at(step.to)
        target.change(step.number, {to: source.now[name]})

    def _begin(self, step: Step) -> None:
        """An fsync begins."""
        self._begun[step.thread] = step.number

    def _end(self, step: Step) -> None:
        """It has ended: what was there when it began is durable."""
        began = self._begun.pop(step.thread)
        if (node := self._node(step.path)) is not None:
            node.sync(began)
            for number, source, target in self._moves:
                if source is node and number < began:  # gone from here for good: it is there
                    target.sync(number + 1)

    def materialize(self, target: Path, draw: random.Random | None = None) -> None:
        """Write down what a power cut at this moment may leave."""
        luck = {number: draw.random() for number in range(self._steps + 1)} if draw else {}
        _write_down(self.top, target, luck, draw)


def _put(into: bytearray, offset: int, data: bytes) -> None:
    if len(into) < offset + len(data):
        into.extend(bytes(offset + len(data) - len(into)))
    into[offset : offset + len(data)] = data


def _resize(content: bytearray, length: int) -> None:
    del content[length:]
    content.extend(bytes(length - len(content)))


def _applied(content: bytes, changes: Iterable[tuple[int, int, bytes | int]]) -> bytearray:
    found = bytearray(content)
    for _, offset, what in changes:
        if isinstance(what, int):
            _resize(found, what)
        else:
            _put(found, offset, what)
    return found


def _pieces(change: tuple[int, int, bytes | int]) -> Iterable[tuple[int, int, bytes | int]]:
    """A write page by page: a disk may hold any of them and not the others."""
    number, offset, what = change
    if isinstance(what, int):
        yield change
        return
    start = 0
    while start < len(what):
        stop = min(len(what), start + PAGE - (offset + start) % PAGE)
        yield number, offset + start, what[start:stop]
        start = stop


def _change(entries: dict[str, File | Folder], changes: Changes) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _read(path: Path) -> Folder:
    found = Folder()
    for each in path.iterdir():
        if each.is_dir():
            found.now[each.name] = _read(each)
        elif each.is_file():
            content = each.read_bytes()
            found.now[each.name] = File(bytearray(content), content)
    found.durable = dict(found.now)
    return found


def _write_down(
    folder: Folder, target: Path, luck: dict[int, float], draw: random.Random | None
) -> None:
    target.mkdir(mode=0o700)
    for name, node in folder.left(luck).items():
        if isinstance(node, Folder):
            _write_down(node, target / name, luck, draw)
        else:
            path = target / name
            path.touch(mode=0o600)
            path.write_bytes(node.left(draw))
