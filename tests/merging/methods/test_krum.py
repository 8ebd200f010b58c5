"""krum: scores by direct distances in float64, its rule for ties, and an attacker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from coldmerge.merging.methods.krum import Krum
from tests.merging.problems import (
    Problem,
    astray,
    attacked,
    close,
    close_as_whole,
    close_by_tensor,
    problems,
    run,
)
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)


def krum(vectors: Floats64, attackers: int, weights: Floats64, keep: int) -> Floats64:
    apart = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    scores = np.sort(apart, axis=1)[:, 1 : len(vectors) - attackers - 1].sum(axis=1)
    order = sorted(range(len(vectors)), key=lambda i: (float(f"{scores[i]:.6g}"), i))[:keep]
    return np.average(vectors[order], axis=0, weights=weights[order])


@quick
@given(
    problems(5, 7, ("random", "absent", "opposed")),
    st.integers(0, 1),
    st.integers(1, 4),
    st.lists(st.floats(0.1, 3), min_size=7, max_size=7),
)
def test_krum_is_the_formula(
    problem: Problem, attackers: int, keep: int, drawn: list[float]
) -> None:
    weights = np.array(drawn[: len(problem.taus)])
    each = [{"weight": weight} for weight in weights]
    how: dict[str, Any] = {"attackers": attackers, "keep": keep}
    found = run("krum", problem, how, each)
    close_as_whole(found, problem, lambda taus: krum(taus, attackers, weights, keep))
    found = run("krum", problem, {**how, "scope": "tensor"}, each)

    def reference(base: Floats64, taus: Floats64) -> Floats64:
        flat = taus.reshape(len(taus), -1)
        return base + krum(flat, attackers, weights, keep).reshape(base.shape)

    close_by_tensor(found, problem, reference)


def test_of_equal_scores_the_lowest_key_wins() -> None:
    base = {"w": np.zeros(200, np.float32)}
    one, two = np.random.default_rng(6).normal(0, 1, (2, 200)).astype(np.float32)
    pairs = [{"w": tau} for tau in (one, two, one, two, one, two)]
    kept = merged("krum", base, pairs, {"attackers": 0})["w"]
    np.testing.assert_array_equal(kept, one)
    kept = merged("krum", base, pairs[1:] + pairs[:1], {"attackers": 0})["w"]
    np.testing.assert_array_equal(kept, two)


@pytest.mark.parametrize("copies", [[0, 1, 0, 1, 0, 1], [0] * 6])
def test_rounding_breaks_no_tie(copies: list[int]) -> None:
    rng = np.random.default_rng(7)
    drawn = rng.normal(0, 1, (2, 50))
    vectors = drawn[copies]
    for _ in range(20):
        noise = 1 + 1e-15 * rng.normal(0, 1, (6, 6))
        scores = Krum(attackers=0).scores(vectors @ vectors.T * (noise + noise.T) / 2)
        assert len(set(scores)) == 1


def test_the_result_is_one_of_the_inputs_and_no_liar() -> None:
    _, problem = attacked()
    for attacker_first in (False, True):
        taus = problem.taus[:: -1 if attacker_first else 1]
        found = merged("krum", problem.base, taus)["w"]
        same = [i for i, tau in enumerate(problem.taus) if np.array_equal(tau["w"], found)]
        assert len(same) == 1
        assert same[0] < len(problem.taus) - 1


def test_an_attacker_leads_the_mean_astray_but_not_krum() -> None:
    assert astray("mean") > 10
    assert astray("krum") < 0.6
    assert astray("krum", {"keep": 6}) < 0.01


def test_the_order_of_the_inputs_is_nothing() -> None:
    _, problem = attacked()
    found = merged("krum", problem.base, problem.taus, {"keep": 3})["w"]
    other = merged("krum", problem.base, problem.taus[::-1], {"keep": 3})["w"]
    close(found, other)


@pytest.mark.parametrize(
    ("count", "parameters"),
    [(4, {}), (2, {"attackers": 0}), (8, {"attackers": 3}), (5, {"keep": 5})],
)
def test_too_few_inputs_are_refused(count: int, parameters: dict[str, int]) -> None:
    taus = [{"w": [float(i), 1.0]} for i in range(count)]
    with pytest.raises(ConfigError) as refused:
        merged("krum", {"w": np.zeros(2)}, taus, parameters)
    assert refused.value.code == "merge.input_count"
