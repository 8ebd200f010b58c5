"""The reference norm, the band, and the bound on what one contribution moves."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from coldmerge.screening.bounds import clip_factor, clip_factors, outside, reference_norm
from coldmerge.screening.policy import ScreeningPolicy

NORMS = st.floats(min_value=1e-30, max_value=1e30)


def test_the_reference_is_the_lower_median_of_what_is_not_zero() -> None:
    assert reference_norm([3.0, 1.0, 2.0]) == 2.0
    assert reference_norm([4.0, 1.0, 2.0, 3.0]) == 2.0
    assert reference_norm([0.0, 5.0, 0.0]) == 5.0
    assert reference_norm([0.0]) is None
    assert reference_norm([]) is None


@given(st.lists(st.floats(1, 2), min_size=2, max_size=9), st.data())
def test_a_minority_cannot_move_the_reference_beyond_honest_norms(
    honest: list[float], data: st.DataObject
) -> None:
    hostile = data.draw(st.lists(st.floats(1e-30, 1e38), max_size=len(honest) - 1))
    found = reference_norm([*honest, *hostile])
    assert found is not None
    assert min(honest) <= found <= max(honest)


@given(NORMS, NORMS, st.floats(0.1, 100))
def test_a_clipped_norm_is_within_the_bound_and_an_ordinary_one_untouched(
    norm: float, reference: float, clip: float
) -> None:
    factor = clip_factor(norm, reference, clip)
    assert 0 < factor <= 1.0
    assert norm * factor <= clip * reference * (1 + 1e-15)
    assert (factor == 1.0) == (norm <= clip * reference)


def test_no_reference_or_no_clip_is_no_factor() -> None:
    assert clip_factor(1e30, None, 2.0) == clip_factor(1e30, 1.0, None) == 1.0
    assert clip_factor(0.0, 1.0, 2.0) == 1.0
    assert list(clip_factors({"b": 4.0, "a": 1.0}, 1.0, 2.0).items()) == [("a", 1.0), ("b", 0.5)]


@given(
    st.integers(3, 12),
    st.integers(1, 6),
    st.sampled_from([1.0, 1e3, 1e9, 1e30]),
    st.integers(0, 2**32 - 1),
)
def test_an_attacker_moves_the_mean_no_more_than_the_largest_admissible_share(
    count: int, size: int, scale: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    vectors = [draw.standard_normal(size) + 1e-3 for _ in range(count)]
    attack = scale * draw.standard_normal(size)
    norms = {str(at): float(np.linalg.norm(v)) for at, v in enumerate([attack, *vectors[1:]])}
    reference = reference_norm(norms.values())
    assert reference is not None
    factors = clip_factors(norms, reference, 2.0)
    share = np.linalg.norm(attack * factors["0"]) / count
    assert share <= 2 * reference / count * (1 + 1e-12)
    if count >= 3:
        assert reference <= max(norms[str(at)] for at in range(1, count))


def test_the_band_says_why() -> None:
    policy = ScreeningPolicy()
    assert outside(1.0, None, policy) is None
    assert outside(0.01, 1.0, policy) is None
    assert outside(10.0, 1.0, policy) is None
    assert "1000 times the round's reference norm 1," in (outside(1000.0, 1.0, policy) or "")
    assert "0.009 times" in (outside(0.009, 1.0, policy) or "")
    assert outside(1e300, 1e-300, policy) is not None
    assert outside(1e9, 1.0, ScreeningPolicy(on_outlier="accept")) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"smallest": 2.0, "largest": 1.0},
        {"clip": 0},
        {"clip": math.inf},
        {"reference_norm": -1.0},
        {"statistics": 0.5},
        {"unknown": 1},
    ],
)
def test_policies_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ScreeningPolicy.model_validate(wrong)


def test_the_lower_median_is_that_of_the_library() -> None:
    norms = [float(value) for value in np.random.default_rng(1).uniform(1, 9, 31)]
    assert reference_norm(norms) == statistics.median(norms)
