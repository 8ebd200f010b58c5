"""Model breadcrumbs: leave out the largest and the smallest entries, then add up or elect."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block, View
from coldmerge.merging.merger import PerInput
from coldmerge.merging.sparsify import Mask, Sparse, SparseMerger, kth_magnitudes


class Crumbs(Sparse):
    """An input of breadcrumbs."""

    gamma: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of the largest entries that is dropped; less where density + gamma "
        "are more than 1, and nothing where density is 1.",
    )


class Range(NamedTuple):
    """The smallest and the largest magnitude kept."""

    low: np.float32
    high: np.float32


class Outliers(SparseMerger):
    """Model Breadcrumbs (arXiv 2312.06795): drop the largest and smallest entries of a tensor.

    mergekit ranks a whole tensor where the paper ranks its rows, and so does this.
    """

    Each: ClassVar[type[PerInput]] = Crumbs

    def prepare(self, view: View) -> list[Range | None]:
        """What is kept of every input; None: everything."""
        ranks = [_ranks(view.size, each) for each in view.each]
        found = kth_magnitudes(view, [() if of is None else of for of in ranks])
        nothing = Range(np.float32(np.inf), np.float32(0))
        return [
            None if of is None else Range(*values) if of else nothing
            for of, values in zip(ranks, found, strict=True)
        ]

    def mask(self, block: Block, i: int, tau: Floats32, fact: Range | None) -> Mask | None:
        """The entries of middling magnitude."""
        if fact is None:
            return None
        magnitudes = np.abs(tau)
        kept: Mask = magnitudes >= fact.low
        kept &= magnitudes <= fact.high
        return kept


class Breadcrumbs(Outliers):
    """Model Breadcrumbs (arXiv 2312.06795): drop the largest and smallest entries, add up.

    A tensor is ranked as one, as mergekit does; the paper ranks its rows. Entries as large
    as the smallest or the largest kept one are kept.
    """

    name: ClassVar[str] = "breadcrumbs"
    elects: ClassVar[bool] = False


class BreadcrumbsTies(Outliers):
    """Model Breadcrumbs (arXiv 2312.06795) with TIES: drop outliers, elect signs.

    A tensor is ranked as one, as mergekit does; the paper ranks its rows. Entries as large
    as the smallest or the largest kept one are kept.
    """

    name: ClassVar[str] = "breadcrumbs_ties"
    elects: ClassVar[bool] = True


def _ranks(size: int, each: Crumbs) -> tuple[int, ...] | None:
    """From the largest down, the ranks of the last and the first entry kept; None: all are."""
    if each.density == 1:
        return None
    target, top = int(each.density * size), int(each.gamma * size)
    bottom = max(0, size - target - top)
    return (size - bottom, size - bottom - target + 1) if target else ()
