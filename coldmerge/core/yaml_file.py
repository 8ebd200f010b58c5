"""YAML as people write settings: one document, no key twice, and nothing that grows when read.

A few bytes of YAML can stand for billions of values (aliases), ask for types of Python
(tags), or say one thing twice. The events of the parser are looked at first: they come one
by one, and nothing is built from them.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18
MAX_DEPTH = 16
MAX_VALUES = 2**13
"""Aliases counted as often as they stand there."""
_LARGEST = 2**63

FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser where PyYAML was built with it."""


class TooDeepError(yaml.MarkedYAMLError):
    """Values are nested more deeply than settings need, or an alias contains itself."""


class TooLargeError(yaml.MarkedYAMLError):
    """There are more values than settings need."""


class CarefulScalars(yaml.constructor.SafeConstructor):
    """Makes plain values; whatever it cannot make is a `ConstructorError`."""

    def construct_yaml_int(self, node: Any) -> int:
        """A whole number of at most 64 bits: longer ones cannot even be printed."""
        try:
            value: int = super().construct_yaml_int(node)
        except ValueError as error:
            raise _unreadable(node, error) from error
        if abs(value) >= _LARGEST:
            raise _unreadable(node, "the number is too large")
        return value

    def construct_yaml_float(self, node: Any) -> float:
        """A number, unless base 60 makes it too large for one."""
        try:
            value: float = super().construct_yaml_float(node)
        except (ValueError, OverflowError) as error:
            raise _unreadable(node, error) from error
        return value

    def construct_yaml_timestamp(self, node: Any) -> Any:
        """A date that there is."""
        try:
            return super().construct_yaml_timestamp(node)
        except (ValueError, OverflowError) as error:
            raise _unreadable(node, error) from error


for _kind in ("int", "float", "timestamp"):
    CarefulScalars.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(CarefulScalars, f"construct_yaml_{_kind}")
    )


class _Loader(CarefulScalars, FAST):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise _unreadable(node, "a key stands here twice")
        return found


def _unreadable(node: Any, why: object) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, str(why), node.start_mark)


def load(path: Path) -> Any:
    """The values of a YAML file: tables, lists, texts, numbers, dates, true, false, None.

    Raises:
        OSError: the file cannot be read.
        yaml.YAMLError: it is not YAML in UTF-8, or not as this module wants it.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise yaml.YAMLError(f"it is larger than {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not text in UTF-8: {error}") from error
    check(text)
    make: Any = _Loader
    loader = make(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def check(text: str, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> None:
    """Look at a document's events before anything is made of it.

    Raises:
        yaml.YAMLError: it is not YAML, too deep or too large, or it has tags or merge keys.
    """
    counter = _Counter(max_depth, max_values)
    event: Any
    for event in yaml.parse(text, Loader=FAST):
        if isinstance(event, yaml.CollectionEndEvent):
            counter.leave()
        elif isinstance(event, yaml.NodeEvent):
            counter.enter(event)


class _Counter:
    def __init__(self, max_depth: int, max_values: int) -> None:
        self._max_depth, self._max_values = max_depth, max_values
        self._count = 0
        self._open: list[tuple[Any, int]] = []
        self._sizes: dict[str, int] = {}

    def enter(self, event: Any) -> None:
        before = self._count
        if isinstance(event, yaml.AliasEvent):
            self._count += self._size(event)
        else:
            self._count += 1
            _check_plain(event)
        if self._count > self._max_values:
            why = f"there are more than {self._max_values} values, aliases counted"
            raise TooLargeError(None, None, why, _mark(event))
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event, before))
            if len(self._open) > self._max_depth + 1:
                why = f"values are nested more than {self._max_depth} deep"
                raise TooDeepError(None, None, why, _mark(event))
        elif event.anchor and not isinstance(event, yaml.AliasEvent):
            self._sizes[event.anchor] = 1

    def _size(self, event: Any) -> int:
        around: Any
        for around, _ in self._open:
            if around.anchor == event.anchor:
                raise TooDeepError(None, None, "an alias contains itself", around.start_mark)
        return self._sizes.get(event.anchor, 1)

    def leave(self) -> None:
        event, before = self._open.pop()
        if event.anchor:
            self._sizes[event.anchor] = self._count - before


def _mark(event: Any) -> Any:
    return event.start_mark


def _check_plain(event: Any) -> None:
    if event.tag not in (None, "tag:yaml.org,2002:str"):
        raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag}", _mark(event))
    if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
        raise yaml.MarkedYAMLError(None, None, "a merge key, `<<`", _mark(event))
