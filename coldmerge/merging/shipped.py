"""Statistics that inputs ship for a merge, and what happens where one did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ConfigError
from coldmerge.merging.block import Block
from coldmerge.merging.merger import PerInput
from coldmerge.merging.sources import Input, ships


def check_shipped(inputs: Sequence[Input], names: Sequence[str], kind: str) -> None:
    """Check before a merge that every input ships `kind` for what it changes of `names`.

    A tensor that no input has the statistic for is left to the method, which takes the mean;
    but a threshold (`trim`) must be there for every tensor.

    Raises:
        ConfigError: an input ships none at all, or not for a tensor that another has it for.
    """
    known = {
        name for name in names if kind == "trim" or any(ships(item, name, kind) for item in inputs)
    }
    for item in inputs:
        changed = [name for name in names if name in item.source.names]
        lacking = [name for name in changed if not ships(item, name, kind)]
        if len(lacking) < len(changed):
            lacking = [name for name in lacking if name in known]
        if lacking:
            raise _missing(str(item), kind, lacking)


def check_density(inputs: Sequence[Input], each: Sequence[PerInput]) -> None:
    """Check that trim thresholds were found at the density that the merge asks for.

    Raises:
        ConfigError: an input's were found at another.
    """
    for item, parameters in zip(inputs, each, strict=True):
        shipped_at = getattr(item.source, "statistics", {}).get("trim")
        asked = getattr(parameters, "density", shipped_at)
        if shipped_at is not None and shipped_at != asked:
            raise ConfigError(
                "merge.other_density",
                f"The trim thresholds of {item} were found at another density.",
                expected=asked,
                got=shipped_at,
                hint=f"Set `density: {shipped_at}`, or extract again with --trim {asked}.",
                input=item,
            )


def shipped(block: Block, kind: str) -> Iterator[tuple[int, Floats32]]:
    """(number, statistic) of the inputs that ship it about a tensor, one at a time in memory.

    Nothing comes where an input changes the tensor and ships none: the method then takes
    the mean. An input that does not change the tensor may have none; it has no say there.

    Raises:
        TaskVectorError: a statistic is NaN or infinite.
    """
    there = [block.ships(i, kind) for i in range(len(block.each))]
    if not all(there[i] for i in block.touching):
        return
    for i in (i for i, found in enumerate(there) if found):
        yield i, block.statistic(i, kind)


def _missing(label: str, kind: str, names: Sequence[str]) -> ConfigError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ConfigError(
        "merge.statistic_missing",
        f"{label} changes {', '.join(names[:3])}{more} and ships no {kind} statistic for them.",
        expected=f"{kind} of every such tensor, measured where the input was trained",
        got="none",
        hint="Choose a method without statistics, or push again while the round asks for them.",
        input=label,
    )
