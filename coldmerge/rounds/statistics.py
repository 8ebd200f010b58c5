"""What a round's recipe asks of its contributors beside deltas: read by both sides of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from coldmerge.core.documents import Statistic

_NEEDS: dict[str, Statistic] = {"fisher": "fisher", "regmean": "gram"}


class Asking(Protocol):
    """A merge policy, as far as it decides what is asked."""

    @property
    def method(self) -> str:
        """Name of the merge method."""
        ...

    @property
    def parameters(self) -> Mapping[str, str | int | float | bool]:
        """The method's parameters."""
        ...


def statistics_for(merge: Asking) -> frozenset[Statistic]:
    """The statistics without which a contribution cannot be merged.

    `fisher` needs the diagonal Fisher information, `regmean` the Gram matrices, `mats`
    either (its `statistic`, by default gram), `ties` with `thresholds: shipped` the trim
    thresholds. Other methods ask for none.

    Raises:
        ValueError: a parameter that decides it has a wrong value; a sentence for a person.
    """
    if merge.method in _NEEDS:
        return frozenset({_NEEDS[merge.method]})
    if merge.method == "mats":
        chosen = merge.parameters.get("statistic", "gram")
        if chosen == "gram":
            return frozenset({"gram"})
        if chosen == "fisher":
            return frozenset({"fisher"})
        raise ValueError(f"`statistic` is gram or fisher, not {chosen!r}")
    return frozenset() if trim_density(merge) is None else frozenset({"trim"})


def trim_density(merge: Asking) -> float | None:
    """The density at which contributors compute their trim thresholds; None: they do not.

    Raises:
        ValueError: thresholds are to be shipped, and `density` does not say for what.
    """
    if merge.method != "ties" or merge.parameters.get("thresholds") != "shipped":
        return None
    density = merge.parameters.get("density")
    if isinstance(density, bool | str | None) or not 0 < density <= 1:
        raise ValueError("`thresholds: shipped` needs a `density`, above 0 and at most 1")
    return float(density)
