"""Coefficients are learned from numbers, resumed anywhere, and show nobody's task vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from coldmerge.rounds import coefficients, descent
from coldmerge.rounds.coefficients import Search, Weights, atoms, group_of, values
from coldmerge.rounds.policy import CoefficientsPolicy, RoundPolicy

NAMES = tuple(f"org-{number:02}" for number in range(24))
METHODS = ("quadratic", "spsa", "fork", "gradient")
QUICK = settings(deadline=None, max_examples=40)
Loss = Callable[[Search], Mapping[str, float]]


def rules(**changes: object) -> CoefficientsPolicy:
    return CoefficientsPolicy.model_validate(changes)


def begun(policy: CoefficientsPolicy, names: Sequence[str], seed: int = 1) -> Search:
    """Everybody consented."""
    return coefficients.begin(policy, names, names, ["layer.0.weight", "layer.1.weight"], seed)


def searched(policy: CoefficientsPolicy, search: Search, loss: Loss, seed: int = 1) -> Search:
    while not search.done:
        assert len(search.probes) < policy.probes
        search = coefficients.advance(search, policy, len(search.probes), loss(search), seed)
        search = Search.from_json(search.to_json())  # a crash between any two probes
    assert coefficients.follows(search, policy, seed)
    return search


def bowl(best: Sequence[float], mix: float = 0.0) -> Callable[[Sequence[float]], float]:
    """A quadratic with its minimum at `best`; with `mix` its axes are not those of the space."""
    count = len(best)
    scales = np.diag(np.linspace(0.5, 2, count)) + mix * np.ones((count, count))

    def value(point: Sequence[float]) -> float:
        off = np.asarray(point) - np.asarray(best)
        return float(off @ scales @ off)

    return value


def told(value: Callable[[Sequence[float]], float], names: Sequence[str] = NAMES[:5]) -> Loss:
    """Everybody reports the same, on a scale of his own."""
    return lambda search: {name: 3 + len(name) + value(search.point) for name in names}


@pytest.mark.parametrize(
    ("method", "probes", "near"), [("quadratic", 60, 0.02), ("spsa", 200, 0.1)]
)
@pytest.mark.parametrize("mix", [0.0, 0.1])
def test_a_bowl_is_searched_as_scipy_does(
    method: str, probes: int, near: float, mix: float
) -> None:
    value = bowl([0.9, 0.1, 0.55, 1.4, -0.3], mix)
    bounds = [(0.0, 1.0)] * 5
    oracle = minimize(value, [0.3] * 5, bounds=bounds, method="L-BFGS-B").x
    policy = rules(method=method, probes=probes)
    found = searched(policy, begun(policy, NAMES[:5]), told(value))
    np.testing.assert_allclose(found.point, oracle, atol=near)
    assert value(found.point) <= value((0.3,) * 5)


@QUICK
@given(
    method=st.sampled_from(METHODS),
    count=st.integers(1, 7),
    by_layer=st.booleans(),
    probes=st.integers(4, 40),
    seed=st.integers(0, 2**31),
    numbers=st.lists(st.floats(-5, 5), min_size=40, max_size=40),
)
def test_every_search_ends_inside_its_bounds_with_the_best_that_was_measured(
    method: str, count: int, by_layer: bool, probes: int, seed: int, numbers: list[float]
) -> None:
    """Whatever is reported."""
    policy = rules(
        method=method, probes=probes, granularity="layer" if by_layer else "task", lower=-0.5
    )
    search = begun(policy, NAMES[:count], seed)
    assert len(search.point) == count * (2 if by_layer else 1)
    found = searched(policy, search, lambda s: {"org-00": numbers[len(s.probes)]}, seed)
    points = [probe.point for probe in found.probes]
    assert points[0] == search.point
    assert all(-0.5 <= one <= 1 for point in points for one in point)
    assert len(set(points)) == len(points)
    measured = [probe.reports["org-00"] for probe in found.probes]
    assert measured[points.index(found.point)] <= min(measured[0], min(measured) + 1e-9)


@QUICK
@given(st.sampled_from(METHODS), st.integers(1, 30), st.integers(0, 2**31))
def test_a_search_is_resumed_from_its_values(method: str, upto: int, seed: int) -> None:
    policy = rules(method=method, probes=30)
    loss = told(bowl([0.2, 0.9, 0.4]))
    search = begun(policy, NAMES[:3], seed)
    for _ in range(upto):
        if search.done:
            break
        again = coefficients.advance(search, policy, 0, loss(search), seed)
        assert coefficients.advance(search, policy, 0, loss(search), seed) == again
        search = again


def test_fork_takes_the_best_branch_and_mixes_in_what_helps() -> None:
    policy = rules(method="fork", probes=40, initial=0.25)
    value = bowl([0.6, 0.4, 0.0, 0.0])
    found = searched(policy, begun(policy, NAMES[:4]), told(value))
    branches = [probe.point for probe in found.probes[1:5]]
    assert sorted(branches) == sorted(tuple(row) for row in np.eye(4))
    assert value(found.point) < min(value(probe.point) for probe in found.probes[:5])
    without = rules(method="fork", branches="without", initial=0.25, probes=5)
    left = searched(without, begun(without, NAMES[:4]), told(value))
    assert sorted(left.probes[1].point) == [0.0, 0.333333, 0.333333, 0.333333]


def test_too_small_a_budget_for_all_axes_is_spent_on_some() -> None:
    policy = rules(probes=9)
    found = searched(policy, begun(policy, NAMES[:12]), told(bowl([0.9] * 12), NAMES[:12]))
    moved = {i for probe in found.probes for i, one in enumerate(probe.point) if one != 0.3}
    assert len(found.probes) in (8, 9)
    assert 3 <= len(moved) <= 8


def test_a_search_whose_steps_are_too_small_to_round_ends() -> None:
    policy = rules(probes=1000, upper=0.30001)
    found = searched(policy, begun(policy, NAMES[:1]), lambda _: {"org-00": 1.0})
    assert len(found.probes) < 40
    assert found.point == (0.3,)


@QUICK
@given(
    count=st.integers(1, 24),
    alone=st.sets(st.sampled_from(NAMES)),
    least=st.integers(2, 5),
    seed=st.integers(0, 2**31),
)
def test_who_shares_with_nobody_has_agreed(
    count: int, alone: set[str], least: int, seed: int
) -> None:
    everyone = NAMES[:count]
    found = atoms(everyone, alone & set(everyone), least, seed)
    assert sorted(name for atom in found for name in atom) == list(everyone)
    if len(found) > 1:
        assert all(len(atom) >= least or set(atom) <= alone for atom in found)
    assert found == atoms(everyone[::-1], alone & set(everyone), least, seed)


@pytest.mark.parametrize("method", METHODS)
def test_no_combination_of_probes_is_one_task_vector(method: str) -> None:
    policy = rules(method=method, probes=60)
    search = coefficients.begin(policy, NAMES[:7], NAMES[:2], [], 5)
    found = searched(policy, search, told(bowl([0.5] * len(search.point)), NAMES[:7]))
    rows = np.array([[found.of(n, p.point)[""] for n in NAMES[:7]] for p in found.probes])
    rank = np.linalg.matrix_rank(rows)
    shown = {
        name
        for name, unit in zip(NAMES, np.eye(7), strict=False)
        if np.linalg.matrix_rank(np.vstack([rows, unit])) == rank
    }
    assert shown <= set(NAMES[:2])


def test_layers_are_told_by_the_first_number() -> None:
    named = {
        "encoder.layer.3.attention.query.weight": "encoder.layer.3",
        "model.layers.11.mlp.up_proj.weight.lora_A": "model.layers.11",
        "embeddings.word_embeddings.weight": "embeddings",
        "features.0.conv.1.bias": "features.0",
        "conv1.weight": "conv1",
        "weight": "weight",
    }
    assert {name: group_of(name) for name in named} == named


def test_nought_is_a_little_and_nothing_learned_is_one() -> None:
    weights = Weights({"a": {"x": 0.0, "y": -0.5}, "b": {"x": 0.7}})
    assert weights.weight("a", "x") == 1e-6
    assert weights.weight("a", "y") == -0.5
    assert weights.weight("b", "y") == weights.weight("c", "x") == 1.0
    assert weights.groups == ("x", "y")


reports = st.lists(
    st.dictionaries(st.sampled_from(NAMES[:6]), st.floats(-50, 50), min_size=1),
    min_size=1,
    max_size=12,
)


@QUICK
@given(reports)
def test_values_depend_on_no_later_report(rows: list[dict[str, float]]) -> None:
    whole = values(rows, 3)
    assert all(values(rows[:stop], 3) == whole[:stop] for stop in range(1, len(rows) + 1))
    assert whole[0] == 0


@QUICK
@given(
    honest=st.lists(st.lists(st.floats(0, 5), min_size=4, max_size=4), min_size=2, max_size=10),
    lies=st.lists(st.floats(-1e4, 1e4), min_size=10, max_size=10),
    clip=st.floats(1, 5),
)
def test_a_liar_moves_a_value_no_more_than_the_clip_lets_it(
    honest: list[list[float]], lies: list[float], clip: float
) -> None:
    without = [dict(zip(NAMES[:4], row, strict=True)) for row in honest]
    mixed = [{**row, "liar": lies[at]} for at, row in enumerate(without)]
    changes = [abs(row[n] - without[0][n]) for row in without for n in NAMES[:4]]
    bound = clip * max(changes)
    for one, other in zip(values(without, clip), values(mixed, clip), strict=True):
        assert abs(other) <= bound + 1e-9
        assert abs(one - other) <= 2 * bound + 1e-9


def test_a_liar_among_seven_does_not_turn_the_search() -> None:
    value = bowl([0.9, 0.1, 0.5])
    policy = rules(probes=40)

    def loss(search: Search) -> dict[str, float]:
        true = value(search.point)
        wish = 1000.0 * (search.point[0] - 0.0)  # wants the first one at nought, loudly
        return {**dict.fromkeys(NAMES[:6], true), "liar": wish}

    found = searched(policy, begun(policy, NAMES[:3]), loss)
    assert found.point[0] > 0.6
    np.testing.assert_allclose(found.point[1:], [0.1, 0.5], atol=0.1)


def test_who_is_missing_matters_little() -> None:
    """Evaluators whose numbers lie far apart come and go."""
    value = bowl([0.9, 0.1, 0.5])
    policy = rules(probes=40)

    def loss(search: Search) -> dict[str, float]:
        here = [name for at, name in enumerate(NAMES[:6]) if (at + len(search.probes)) % 3]
        return {name: 10 * NAMES.index(name) + value(search.point) for name in here}

    found = searched(policy, begun(policy, NAMES[:3]), loss)
    np.testing.assert_allclose(found.point, [0.9, 0.1, 0.5], atol=0.02)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lower": 1.0, "upper": 0.0}, "upper must be above lower"),
        ({"initial": 2.0}, "between lower and upper"),
        ({"probes": 3}, "greater than or equal to 4"),
        ({"method": "adam"}, "quadratic"),
        ({"initial": float("nan")}, "finite"),
    ],
)
def test_wrong_rules_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rules(**wrong)


def test_the_search_for_a_bad_update_is_another_one() -> None:
    values = {"merge": {"coefficients": {}}, "gate": {"on_reject": "isolate"}}
    with pytest.raises(ValueError, match="leave one out"):
        RoundPolicy.model_validate(values)


def test_a_generator_that_is_spent_asks_for_nothing() -> None:
    box = descent.Box((0.5,), 0.0, 1.0, 0.1, 3)
    assert descent.replayed(descent.quadratic(box), [], 3) == (0.5,)
    assert descent.replayed(descent.quadratic(box), [1.0, 2.0, 3.0], 3) is None
    assert descent.replayed(descent.fork(box, []), [1.0], 3) is None
