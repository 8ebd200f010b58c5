"""How sure a mean difference is: within the sets that were measured, and across sets.

Two releases are compared on the same test examples, after the same training examples were
drawn. A set's difference is an array [seeds, draws, n] of -1, 0 and 1 (what one gets right
and the other does not); a group's is the mean over its sets, each of which counts alike.

Three questions, three intervals:

* `over_examples`: would other test examples of these sets say the same? Examples are drawn
  again, with replacement, within each set. What seeds and draws say of one example is averaged
  first: they are repetitions, not observations, so that more of them narrow nothing by being
  more.
* `over_runs`: and if we had trained with other seeds, and drawn other training examples? Seeds
  (for all sets together, as a seed is one run), draws (within each set and seed) and examples
  are drawn again, runs and examples each by themselves (Owen 2007, "The pigeonhole bootstrap").
* `over_sets`: would other sets say the same? Student's t over the sets' differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Differences = NDArray[np.float64]
"""Of one set: [seeds, draws, n], each from -1 to 1."""

LEVEL = 0.95
RESAMPLES = 4_000
RUN_RESAMPLES = 2_000
SEED = 2212_01378


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, in points."""

    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether all of it is."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether all of it is."""
        return self.high < 0

    def __str__(self) -> str:
        low, high = (round(round(end, 4), 1) + 0 for end in (self.low, self.high))
        return f"[{low:+.1f}, {high:+.1f}]"


def points(values: Differences) -> float:
    """A set's mean difference, in points."""
    return 100 * float(np.mean(values))


def over_examples(
    sets: Sequence[Differences],
    weights: Sequence[float] | None = None,
    *,
    seed: int = SEED,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Percentile bootstrap of a weighted sum over sets, stratified by set; their mean by default.

    The same arrays in the same order give the same interval. Of the order of examples it does
    not depend.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for values, weight in zip(sets, _weights(sets, weights), strict=True):
        examples = np.round(values.mean(axis=(0, 1)), 12)[:, None]
        total += weight * _resampled(rng, examples, resamples)[:, 0]
    return _percentiles(total, level)


def over_runs(
    sets: Sequence[Differences],
    weights: Sequence[float] | None = None,
    *,
    seed: int = SEED,
    resamples: int = RUN_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The same with seeds and draws drawn again too. All sets have the same seeds, in order.

    With one seed and one draw there is nothing to draw: it is `over_examples`, up to chance.
    """
    rng = np.random.default_rng(seed)
    seeds = _multinomial(rng, np.ones(sets[0].shape[0]), resamples)
    total = np.zeros(resamples)
    for values, weight in zip(sets, _weights(sets, weights), strict=True):
        per_seed = [_multinomial(rng, np.ones(values.shape[1]), resamples) for _ in values]
        by_draw = np.stack(per_seed, axis=1)
        means = _resampled(rng, values.reshape(-1, values.shape[2]).T, resamples)
        means = means.reshape(-1, *values.shape[:2])
        total += weight * np.einsum("bsd,bs,bsd->b", means, seeds, by_draw)
    return _percentiles(total, level)


def over_sets(gains: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Student's t of the mean of some numbers (the sets' gains); None for fewer than two."""
    if len(gains) < 2:
        return None
    reach = float(stdtrit(len(gains) - 1, (1 + level) / 2)) * standard_error(gains)
    return Interval(fmean(gains) - reach, fmean(gains) + reach)


def standard_error(gains: Sequence[float]) -> float:
    """Of the mean; nan for fewer than two."""
    return stdev(gains) / sqrt(len(gains)) if len(gains) > 1 else float("nan")


def _weights(sets: Sequence[Differences], weights: Sequence[float] | None) -> Sequence[float]:
    return [1 / len(sets)] * len(sets) if weights is None else weights


def _resampled(rng: np.random.Generator, rows: Differences, resamples: int) -> Differences:
    """Means of the rows, drawn again with replacement: [resamples, columns]."""
    # Few rows are unlike: how often each kind is drawn is multinomial.
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    means: Differences = _multinomial(rng, counts, resamples) @ kinds
    return means


def _multinomial(
    rng: np.random.Generator, counts: NDArray[np.int64] | Differences, resamples: int
) -> Differences:
    """Shares of each kind in as many draws as there are: [resamples, kinds]."""
    n = int(counts.sum())
    shares: Differences = rng.multinomial(n, counts / n, size=resamples) / n
    return shares


def _percentiles(values: Differences, level: float) -> Interval:
    low, high = np.percentile(100 * values, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(low), float(high))
