"""JSON that says one thing: no key twice, and nothing that is not JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def loads(text: str | bytes) -> Any:
    """Read JSON whose tables name each key once; NaN and infinities are not JSON.

    Raises:
        ValueError: it is something else.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=unique, parse_constant=_no_number)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of pairs whose keys differ, for `object_pairs_hook`.

    Raises:
        ValueError: a key stands twice.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return table


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
