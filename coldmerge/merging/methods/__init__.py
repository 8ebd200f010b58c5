"""The mergers by the name of their method. A new one is a file here, a line below, its test."""

from __future__ import annotations

from coldmerge.core.errors import ConfigError
from coldmerge.merging.engine import Merger
from coldmerge.merging.methods.mean import Mean

MERGERS: dict[str, Merger] = {"mean": Mean()}


def merger(name: str) -> Merger:
    """The merger of the method called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in MERGERS:
        raise ConfigError(
            "merge.unknown_method",
            f"There is no merge method {name}.",
            expected=" | ".join(sorted(MERGERS)),
            got=name,
            hint="Change `merge.method` in the round policy.",
        )
    return MERGERS[name]
