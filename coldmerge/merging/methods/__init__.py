"""The merge methods by name. A new one is a file here, a line below, and its test."""

from __future__ import annotations

from coldmerge.core.errors import ConfigError
from coldmerge.merging.engine import Method
from coldmerge.merging.methods.mean import Mean

METHODS: dict[str, Method] = {"mean": Mean()}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(
            "merge.unknown_method",
            f"There is no merge method {name}.",
            expected=" | ".join(sorted(METHODS)),
            got=name,
            hint="Change `merge.method` in the round policy.",
        )
    return METHODS[name]
