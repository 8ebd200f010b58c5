"""What other packages add by entry point: found by group and name, loaded when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class BrokenPluginError(Exception):
    """An entry point that cannot be loaded, or leads to something else than its group asks for."""

    def __init__(self, target: str, got: str) -> None:
        super().__init__(f"{target}: {got}")
        self.target, self.got = target, got


def plugin_names(group: str) -> list[str]:
    """The names of all entry points of a group, sorted."""
    return sorted({point.name for point in _points(group)})


def plugin(group: str, name: str, fault: Callable[[Any], str]) -> Any:
    """What the entry point `name` of a group leads to; None: there is no such entry point.

    `fault` says in words what it is not; nothing where it is what the group asks for.

    Raises:
        BrokenPluginError: it cannot be loaded, or it is something else.
    """
    found = None
    for point in (point for point in _points(group) if point.name == name):
        try:
            found = point.load()
            wrong = fault(found)
        except Exception as error:
            raise BrokenPluginError(point.value, f"{type(error).__name__}: {error}") from error
        if wrong:
            raise BrokenPluginError(point.value, wrong)
    return found


def _points(group: str) -> tuple[EntryPoint, ...]:
    return _points_on(group, tuple(sys.path))


@cache
def _points_on(group: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Looking for them opens a file of every installed package: once for each search path."""
    return tuple(entry_points(group=group))
