"""Statistics that inputs ship for a merge, and what happens where one did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from coldmerge.core.algebra import Delta
from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ConfigError, TaskVectorError
from coldmerge.merging.block import Block
from coldmerge.merging.sources import Input, Statistics


def check_shipped(inputs: Sequence[Input], names: Sequence[str], kind: str) -> None:
    """Check before a merge that every input ships `kind` for what it changes of `names`.

    A tensor that no input has the statistic for is left to the method, which takes the mean.

    Raises:
        ConfigError: an input ships none at all, or not for a tensor that another has it for.
    """
    known = {n for n in names if any(_ships(item.source, n, kind) for item in inputs)}
    for item in inputs:
        changed = [name for name in names if name in item.source.names]
        lacking = [name for name in changed if not _ships(item.source, name, kind)]
        if len(lacking) < len(changed):
            lacking = [name for name in lacking if name in known]
        if lacking:
            raise _missing(str(item), kind, lacking)


def shipped(block: Block, kind: str) -> Iterator[tuple[int, Floats32]]:
    """(number, statistic) of the inputs that ship it about a tensor, one at a time in memory.

    Nothing comes where no input ships it. An input that does not change the tensor may have
    none; it has no say there.

    Raises:
        ConfigError: an input changes the tensor and ships none, where another does.
        TaskVectorError: a statistic is NaN or infinite.
    """
    found, lacking = False, []
    for i in range(len(block.each)):
        statistic = block.statistic(i, kind)
        if statistic is None:
            lacking += [i] if i in block.touching else []
            continue
        found = True
        if not np.isfinite(statistic).all():
            raise TaskVectorError(
                "merge.statistic_not_finite",
                f"The {kind} of tensor {block.name} of {block.label(i)} holds NaN or infinity.",
                expected="finite values",
                hint="Leave that input out, or let its contributor measure again.",
                tensor=block.name,
            )
        yield i, statistic
    if found and lacking:
        raise _missing(block.label(lacking[0]), kind, [block.name])


def _ships(source: Delta, name: str, kind: str) -> bool:
    return hasattr(source, "has_statistic") and cast(Statistics, source).has_statistic(name, kind)


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
