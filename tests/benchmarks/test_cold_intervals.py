from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.cold.intervals import (
    Differences,
    Interval,
    over_examples,
    over_runs,
    over_sets,
    points,
    standard_error,
)


def arrays(seeds: int = 1, draws: int = 1) -> st.SearchStrategy[list[Differences]]:
    """A few sets of differences, as a comparison has them."""
    numbers = st.integers(0, 2**32 - 1)
    sizes = st.lists(st.integers(2, 40), min_size=1, max_size=4)
    return st.builds(lambda seed, ns: some(seed, ns, seeds, draws), numbers, sizes)


def some(seed: int, sizes: Sequence[int], seeds: int = 1, draws: int = 1) -> list[Differences]:
    rng = np.random.default_rng(seed)
    return [rng.choice([-1.0, 0.0, 1.0], (seeds, draws, n), p=[0.1, 0.6, 0.3]) for n in sizes]


def mean_of(sets: Sequence[Differences]) -> float:
    return float(np.mean([points(values) for values in sets]))


def test_it_is_scipys_percentile_bootstrap_stratified_by_set() -> None:
    sets = some(0, [80, 300, 120], seeds=3, draws=2)
    samples = [values.mean(axis=(0, 1)) for values in sets]

    def statistic(*drawn: Differences, axis: int) -> Differences:
        return np.asarray(np.mean([100 * one.mean(axis=axis) for one in drawn], axis=0))

    theirs = stats.bootstrap(
        samples, statistic, method="percentile", n_resamples=9_999, rng=np.random.default_rng(1)
    ).confidence_interval
    ours = over_examples(sets)
    assert ours.low == pytest.approx(theirs.low, abs=0.15)
    assert ours.high == pytest.approx(theirs.high, abs=0.15)


def test_weights_are_of_sets() -> None:
    one, other = some(1, [200, 300])
    both = over_examples([one, other], [1.0, -1.0])
    spread = np.sqrt(sum(np.var(a) / a.size for a in (one, other)))
    assert both.high - both.low == pytest.approx(100 * 2 * 1.96 * spread, rel=0.06)
    assert both.low < points(one) - points(other) < both.high


def test_across_sets_it_is_students() -> None:
    gains = [4.0, -1.0, 2.5, 3.0, 0.5]
    theirs = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    ours = over_sets(gains)
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert standard_error(gains) == pytest.approx(stats.sem(gains))
    assert over_sets([1.0]) is None


@settings(max_examples=40, deadline=None)
@given(arrays(2, 2))
def test_the_same_records_give_the_same_interval_whatever_the_order_of_examples(
    sets: list[Differences],
) -> None:
    turned = [values[:, :, ::-1] for values in sets]
    assert over_examples(sets) == over_examples(sets) == over_examples(turned)


@settings(max_examples=40, deadline=None)
@given(arrays())
def test_repeating_runs_narrows_nothing(sets: list[Differences]) -> None:
    repeated = [np.tile(values, (3, 4, 1)) for values in sets]
    assert over_examples(repeated) == over_examples(sets)


@settings(max_examples=40, deadline=None)
@given(arrays(2, 3))
def test_ends_are_in_order_and_in_range(sets: list[Differences]) -> None:
    for interval in (over_examples(sets), over_runs(sets)):
        assert -100 <= interval.low <= interval.high <= 100
    lows = [over_examples(sets, level=level).low for level in (0.5, 0.8, 0.95)]
    assert lows == sorted(lows, reverse=True)


@settings(max_examples=20, deadline=None)
@given(arrays(), st.integers(-1, 1))
def test_without_differences_there_is_no_doubt(sets: list[Differences], value: int) -> None:
    flat = [np.full_like(values, value) for values in sets]
    for interval in (over_examples(flat), over_runs(flat)):
        assert (interval.low, interval.high) == pytest.approx((100 * value, 100 * value))


def test_more_examples_narrow_it() -> None:
    sets = some(2, [50, 60])
    small, large = over_examples(sets), over_examples([np.tile(v, (1, 1, 16)) for v in sets])
    assert large.high - large.low == pytest.approx((small.high - small.low) / 4, rel=0.15)


def test_unlike_seeds_and_draws_widen_it_when_they_are_drawn_again() -> None:
    sets = some(3, [400, 400], seeds=3, draws=5)
    alike = over_runs(some(3, [400, 400]))
    plain = over_examples(some(3, [400, 400]))
    assert alike.low == pytest.approx(plain.low, abs=0.3)
    moved = [values + np.array([-0.2, 0.0, 0.2])[:, None, None] for values in sets]
    by_examples, by_runs = over_examples(moved), over_runs(moved)
    assert by_runs.high - by_runs.low > 3 * (by_examples.high - by_examples.low)
    # One seed serves all sets: their moves do not average out.
    assert by_runs.high - by_runs.low > 30


def test_an_interval_covers_what_it_should() -> None:
    truth, hits = 100 * 0.2, 0
    for seed in range(200):
        interval = over_examples(some(seed, [150, 150]), resamples=500)
        hits += interval.low <= truth <= interval.high
    assert 180 <= hits <= 198


def test_words() -> None:
    assert str(Interval(-0.04, 1.26)) == "[+0.0, +1.3]"
    assert Interval(0.1, 1).above_zero
    assert Interval(-1, -0.1).below_zero
