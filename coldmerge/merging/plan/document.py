"""A YAML document whose every value knows its line and column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from coldmerge.core import yaml_file
from coldmerge.core.errors import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_VALUES = 2**13
"""Aliases counted as often as they stand there: a few bytes can stand for billions of values."""

_NAMES = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}


@dataclass(frozen=True)
class Where:
    """A place in a file, counted from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, column {self.column}"


@dataclass(frozen=True)
class Node:
    """A value: a scalar, a list of nodes, or a mapping of texts to nodes.

    `keys` are the places of a mapping's keys.
    """

    value: Any
    where: Where
    keys: dict[str, Where]

    @property
    def kind(self) -> str:
        """What the value is, as a message says it."""
        return _NAMES.get(type(self.value), str(self.value))

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, list):
            return [item.plain for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain for key, item in self.value.items()}
        return self.value

    def text(self, what: str) -> str:
        """The value, which must be a text; `what` it stands for is named otherwise.

        Raises:
            ConfigError: it is something else.
        """
        if not isinstance(self.value, str) or not self.value.strip():
            raise self._wrong(what, "a text")
        return self.value

    def items(self, what: str) -> list[Node]:
        """The value, which must be a list with something in it.

        Raises:
            ConfigError: it is something else.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self._wrong(what, "a list")
        return self.value

    def mapping(self, what: str, allowed: frozenset[str]) -> dict[str, Node]:
        """The value, which must be a mapping with no other keys than these.

        Raises:
            ConfigError: it is something else, or has another key.
        """
        if not isinstance(self.value, dict):
            raise self._wrong(what, "a mapping")
        for key, where in self.keys.items():
            if key not in allowed:
                raise ConfigError(
                    "plan.unknown_key",
                    f"{where}: {what} cannot have the key `{key}`.",
                    expected=", ".join(sorted(allowed)),
                    got=key,
                    hint=suggestion(key, allowed),
                    at=where,
                )
        return self.value

    def _wrong(self, what: str, expected: str) -> ConfigError:
        return ConfigError(
            "plan.wrong_type",
            f"{self.where}: {what} must be {expected}.",
            expected=expected,
            got=self.kind,
            hint="Compare with the plans in examples/merge, or read docs/merging.md.",
            at=self.where,
        )


def suggestion(word: str, words: frozenset[str] | set[str]) -> str:
    """A hint: the word that was probably meant, or where all are listed."""
    close = get_close_matches(word, sorted(words), 1)
    if close:
        return f"Did you mean `{close[0]}`?"
    return "Remove it; docs/merging.md lists every word of a plan."


def read(path: Path) -> tuple[str, Node]:
    """The text of a YAML file, and its document.

    Raises:
        ConfigError: it cannot be read, is not YAML, has several documents, a key twice, or
            is nested too deeply.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        text = raw.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            "plan.unreadable",
            f"The plan cannot be read: {reason}.",
            expected="a YAML file in UTF-8",
            got=path,
            hint="Give the path of a plan; examples/merge has some.",
        ) from error
    return text, _compose(text, path.name)


def _compose(text: str, file: str) -> Node:
    try:
        yaml_file.check(text, MAX_DEPTH, MAX_VALUES)
        root = yaml.compose(text, Loader=yaml_file.FAST)
    except (yaml_file.TooDeepError, yaml_file.TooLargeError) as error:
        raise _beyond_a_limit(error, file) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = Where(file, mark.line + 1, mark.column + 1) if mark else Where(file, 1, 1)
        raise ConfigError(
            "plan.not_yaml",
            f"{where}: this is not YAML: {error.problem}.",
            expected="one YAML document",
            got=error.context or error.problem,
            hint="Check the indentation, quotes and colons up to this line; several documents"
            " (`---`) are several plans, one file each.",
            at=where,
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            "plan.not_yaml",
            f"{file} is not YAML: {error}.",
            expected="one YAML document",
            hint="Save the plan as plain text in UTF-8.",
        ) from error
    if root is None:
        return Node(None, Where(file, 1, 1), {})
    return _Converter(file).node(root)


def _beyond_a_limit(error: yaml.MarkedYAMLError, file: str) -> ConfigError:
    mark: Any = error.problem_mark
    where = Where(file, mark.line + 1, mark.column + 1)
    if isinstance(error, yaml_file.TooDeepError):
        return ConfigError(
            "plan.too_deep",
            f"{where}: the plan is nested too deeply.",
            expected=f"at most {MAX_DEPTH} levels",
            hint="A plan needs six; look for an alias that contains itself.",
            at=where,
        )
    return ConfigError(
        "plan.too_large",
        f"{where}: the plan has too many values.",
        expected=f"at most {MAX_VALUES}, aliases counted as often as they stand there",
        hint="Write patterns with filters instead of one value for each tensor.",
        at=where,
    )


class _Converter:
    def __init__(self, file: str) -> None:
        self._file = file
        self._done: dict[int, Node] = {}
        self._scalars = yaml_file.CarefulScalars()

    def node(self, raw: Any) -> Node:
        if id(raw) not in self._done:
            self._done[id(raw)] = self._convert(raw)
        return self._done[id(raw)]

    def _convert(self, raw: Any) -> Node:
        where = self._where(raw)
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node(item) for item in raw.value], where, {})
        if isinstance(raw, yaml.MappingNode):
            keys: dict[str, Where] = {}
            value = {}
            for key, item in self._pairs(raw):
                keys[key.value] = self._where(key)
                value[key.value] = self.node(item)
            return Node(value, where, keys)
        try:
            return Node(self._scalars.construct_object(raw), where, {})
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or error
            raise ConfigError(
                "plan.bad_scalar",
                f"{where}: a value cannot be read: {reason}.",
                expected="a number, a text, true or false",
                got=str(raw.value)[:80],
                hint="Put it in quotes if it is a text.",
                at=where,
            ) from error

    def _pairs(self, raw: Any) -> Iterator[tuple[Any, Any]]:
        seen: dict[str, Where] = {}
        for key, item in raw.value:
            where = self._where(key)
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise ConfigError(
                    "plan.bad_key",
                    f"{where}: the key {name} is not a text, or stands here twice.",
                    expected="every key once, each a plain text",
                    got=f"first in line {seen[name].line}" if name in seen else name,
                    hint="Remove one of the two.",
                    at=where,
                )
            seen[key.value] = where
            yield key, item

    def _where(self, raw: Any) -> Where:
        return Where(self._file, raw.start_mark.line + 1, raw.start_mark.column + 1)
