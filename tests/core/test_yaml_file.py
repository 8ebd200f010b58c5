"""YAML of settings: what is read, and what is refused before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from coldmerge.core import yaml_file


def _load(folder: Path, text: str | bytes) -> Any:
    path = folder / "x.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return yaml_file.load(path)


GOOD: dict[str, object] = {
    "": None,
    "a: 1\nb: [x, 2.5, true, null]\n": {"a": 1, "b": ["x", 2.5, True, None]},
    "a: &x {k: v}\nb: [*x, *x]\n": {"a": {"k": "v"}, "b": [{"k": "v"}, {"k": "v"}]},
    "a: !!str 1\n": {"a": "1"},
    "1: a\n'1': b\n": {1: "a", "1": "b"},
    "a: '<<'\n": {"a": "<<"},
}


@pytest.mark.parametrize("text", sorted(GOOD))
def test_plain_values_are_read(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, text) == GOOD[text]


BAD: dict[str, tuple[str | bytes, str]] = {
    "a key twice": ("a: 1\na: 2\n", "twice"),
    "a key twice, inside": ("b: [{a: 1, 'a': 2}]\n", "twice"),
    "the same number twice": ("1: a\n0x1: b\n", "twice"),
    "a cycle": ("a: &a [*a]\n", "contains itself"),
    "an alias of nothing": ("a: *b\n", "undefined alias"),
    "a bomb": ("a: &a [x,x,x,x]\n" + "b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" * 999, "more than"),
    "too many": ("[" + "x," * yaml_file.MAX_VALUES + "]", "more than"),
    "too deep": ("[" * (yaml_file.MAX_DEPTH + 2), "nested"),
    "a tag": ("a: !!timestamp x\n", "tag"),
    "a tag of Python": ("a: !!python/name:os.system\n", "tag"),
    "a merge key": ("a: &a {k: 1}\nb: {<<: *a}\n", "merge key"),
    "a day that there is not": ("a: 2026-13-45\n", "month"),
    "a number that cannot be printed": (f"a: 0x{'f' * 5000}\n", "too large"),
    "more digits than Python reads": (f"a: {'9' * 5000}\n", "limit"),
    "base 60 beyond a float": (f"a: 1{':00' * 200}:00.5\n", "large"),
    "no digits": ("a: 0b_\n", "invalid literal"),
    "two documents": ("a: 1\n---\nb: 1\n", "document"),
    "other bytes": (b"a: \xff\n", "UTF-8"),
    "too long": (b"#" * (yaml_file.MAX_BYTES + 1), "larger"),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_anything_else_is_refused(tmp_path: Path, what: str) -> None:
    text, why = BAD[what]
    with pytest.raises(yaml.YAMLError, match=why):
        _load(tmp_path, text)


def test_limits_are_reached_and_not_passed(tmp_path: Path) -> None:
    many = "[" + "x," * (yaml_file.MAX_VALUES - 1) + "]"
    assert len(_load(tmp_path, many)) == yaml_file.MAX_VALUES - 1
    deep = yaml_file.MAX_DEPTH + 1
    assert _load(tmp_path, "[" * deep + "]" * deep) is not None
