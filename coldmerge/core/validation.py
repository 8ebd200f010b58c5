"""What is wrong with values that a pydantic model refused: a place and a sentence."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError


class Problem(NamedTuple):
    """The first thing that is wrong. `got` is None where a key is missing."""

    key: str
    text: str
    got: object


def first_problem(error: ValidationError, whole: str = "the top level") -> Problem:
    """The first problem; `whole` stands for the key when no single one is to blame.

    `text` has no full stop, and not the prefix that pydantic gives to our own sentences.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or whole
    text = first["msg"].removeprefix("Value error, ").removesuffix(".")
    return Problem(key, text, None if first["type"] == "missing" else first["input"])
