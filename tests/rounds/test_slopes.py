"""A search along slopes that evaluators report: where it goes, who may turn it, what is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from coldmerge.core.documents import Evaluation
from coldmerge.rounds import coefficients, descent, slopes
from coldmerge.rounds.coefficients import Probe, Search
from coldmerge.rounds.descent import Box
from coldmerge.rounds.policy import CoefficientsPolicy, RoundPolicy

NAMES = tuple(f"org-{number:02}" for number in range(12))
QUICK = settings(deadline=None, max_examples=40)
Judge = Callable[..., Evaluation]
Vector = Sequence[float]


def rules(**changes: object) -> CoefficientsPolicy:
    return CoefficientsPolicy.model_validate({"method": "gradient", **changes})


def begun(policy: CoefficientsPolicy, count: int, layers: int = 1) -> Search:
    tensors = [f"layer.{number}.weight" for number in range(layers)]
    return coefficients.begin(policy, NAMES[:count], NAMES[:count], tensors, 1)


def bowl(best: Vector, mix: float = 0.1) -> tuple[Callable[[Vector], float], Callable[..., Vector]]:
    """A quadratic with its minimum at `best`, and its gradient."""
    count = len(best)
    scales = np.diag(np.linspace(0.5, 2, count)) + mix * np.ones((count, count))

    def value(point: Vector) -> float:
        off = np.asarray(point) - np.asarray(best)
        return float(off @ scales @ off)

    def slope(point: Vector) -> Vector:
        found: Vector = (2 * scales @ (np.asarray(point) - np.asarray(best))).tolist()
        return found

    return value, slope


def told(search: Search, policy: CoefficientsPolicy, slope: Vector) -> tuple[float, ...]:
    """What an evaluator reports: along what the first candidates differ by."""
    width = len(search.groups)
    points = [probe.point for probe in search.probes]
    return tuple(
        each * (points[1 + at // width][at] - points[0][at]) for at, each in enumerate(slope)
    )


def searched(
    policy: CoefficientsPolicy,
    search: Search,
    value: Callable[[Vector], float],
    slope: Callable[..., Vector],
    liar: Callable[[tuple[float, ...]], tuple[float, ...]] | None = None,
) -> Search:
    """Five evaluators and perhaps a liar report; a crash between any two probes."""
    while not search.done:
        reports = dict.fromkeys(NAMES[:5], value(search.point))
        mean = None
        if slopes.asked(search, policy):
            right = told(search, policy, slope(search.point))
            said = dict.fromkeys(NAMES[:5], right) | ({"liar": liar(right)} if liar else {})
            mean = slopes.combined(search, policy, said)
        number = len(search.probes)
        search = coefficients.advance(
            search, policy, number, reports, 1, candidate=f"{number:064}", slopes=mean
        )
        search = Search.from_json(search.to_json())
    assert coefficients.follows(search, policy, 1)
    return search


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mix", [0.0, 0.1])
def test_a_bowl_is_searched_as_scipy_does(layers: int, mix: float) -> None:
    best = [0.9, 0.1, 0.55, 1.4, -0.3, 0.7][: 3 * min(layers, 2)] + [0.2] * 3 * (layers - 2)
    best = best[: 3 * layers]
    value, slope = bowl(best, mix)
    count = len(best)
    oracle = minimize(value, [0.3] * count, bounds=[(0.0, 1.0)] * count, method="L-BFGS-B").x
    policy = rules(probes=60, granularity="layer" if layers > 1 else "task")
    search = begun(policy, 3, layers)
    assert len(search.point) == count
    found = searched(policy, search, value, slope)
    np.testing.assert_allclose(found.point, oracle, atol=0.05)
    first = [probe.point for probe in found.probes[:4]]
    assert first[0] == (0.3,) * count
    assert first[2] == (0.3,) * layers + (0.5,) * layers + (0.3,) * layers


def test_slopes_take_fewer_probes_than_values() -> None:
    value, slope = bowl([0.9, 0.1, 0.55, 0.6, 0.4, 0.2, 0.75, 0.05, 0.5, 0.3])
    ends = {}
    for method in ("gradient", "spsa"):
        policy = rules(method=method, probes=31)
        ends[method] = value(searched(policy, begun(policy, 10), value, slope).point)
    assert ends["gradient"] < 0.5 * ends["spsa"]


def test_a_start_on_the_bound_moves_inwards_and_comes_back_to_where_it_was() -> None:
    """A step may lead to a point that was measured before slopes were asked for."""
    box = Box(start=(1.0, 0.0), lower=0.0, upper=1.0, step=0.2, budget=20)
    assert descent.aside(box, 0, 1) == (0.8, 0.0)
    assert descent.aside(box, 1, 1) == (1.0, 0.2)
    value, slope = bowl([0.7])
    policy = rules(initial=0.0, probes=20)
    found = searched(policy, begun(policy, 1), value, slope)
    assert found.probes[1].point == (0.2,)
    assert len(found.probes) > 10
    assert found.point[0] == pytest.approx(0.7, abs=0.02)


def test_a_search_without_slopes_ends_and_other_slopes_do_not_follow() -> None:
    policy = rules(probes=20)
    value, slope = bowl([0.9, 0.2, 0.5])
    found = searched(policy, begun(policy, 3), value, slope)
    probes = list(found.probes)
    probes[6] = replace(probes[6], slopes=tuple(-one for one in probes[6].slopes or ()))
    assert not coefficients.follows(replace(found, probes=tuple(probes)), policy, 1)
    search = begun(policy, 3)
    while not search.done:
        search = coefficients.advance(search, policy, 0, {"a": value(search.point)}, 1)
    assert len(search.probes) == 5


def test_a_search_from_before_there_were_slopes_is_read() -> None:
    old = {"number": 3, "point": [0.5], "reports": {"a": 1.0}}
    assert Probe.from_json(old) == Probe(3, (0.5,), {"a": 1.0})
    new = Probe(3, (0.5,), {"a": 1.0}, "0" * 64, (0.25,))
    assert Probe.from_json(new.to_json()) == new


def test_what_is_asked_and_along_what() -> None:
    policy = rules(probes=20, granularity="layer")
    search = begun(policy, 2, 3)
    for number in range(3):
        assert slopes.asked(search, policy) == ""
        assert len(slopes.directions(search, policy)) == number
        digest = f"{number:064}"
        reports = {"a": float(number)}
        search = coefficients.advance(search, policy, number, reports, 1, candidate=digest)
    assert slopes.asked(search, policy) == "layer"
    assert slopes.directions(search, policy) == tuple(f"{number:064}" for number in range(3))
    assert slopes.asked(replace(search, groups=("",)), policy) == "task"
    assert slopes.asked(replace(search, done=True), policy) == ""
    assert slopes.asked(search, rules(method="spsa")) == ""
    assert slopes.directions(search, rules(method="spsa")) == ()


def test_slopes_are_read_by_layer(judge: Judge) -> None:
    search = begun(rules(granularity="layer"), 2, 3)
    assert search.groups == ("layer.0", "layer.1", "layer.2")

    def said(**told: tuple[float, ...]) -> Evaluation:
        named = {name.replace("_", "."): each for name, each in told.items()}
        return judge("a", 1.0).model_copy(update={"slopes": named})

    some = said(layer_2=(3.0, 6.0), layer_0=(1.0, 4.0))
    assert slopes.reported(search, some) == (1.0, 0.0, 3.0, 4.0, 0.0, 6.0)
    assert slopes.reported(search, said()) is None
    assert slopes.reported(search, said(layer_0=(1.0,))) is None
    assert slopes.reported(search, said(layer_3=(1.0, 2.0))) is None


@QUICK
@given(
    honest=st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=3, max_size=7),
    lie=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
    clip=st.floats(1, 5),
)
def test_a_liar_moves_the_mean_no_more_than_the_clip_lets_it(
    honest: list[list[float]], lie: list[float], clip: float
) -> None:
    policy = rules(clip=clip)
    search = begun(policy, 2)
    for _ in range(3):
        search = coefficients.advance(search, policy, 0, {"a": 1.0}, 1)
    said = {name: tuple(row) for name, row in zip(NAMES, honest, strict=False)}
    mixed = slopes.combined(search, policy, {**said, "liar": (lie[0], lie[1])})
    assert mixed is not None
    largest = max(math.hypot(*row) for row in honest)
    assert 0.2 * math.hypot(*mixed) <= largest * (len(said) + clip) / (len(said) + 1) + 1e-6


def test_a_liar_among_six_does_not_turn_the_search() -> None:
    value, slope = bowl([0.9, 0.1, 0.5])
    policy = rules(probes=40)
    found = searched(
        policy, begun(policy, 3), value, slope, lambda right: (1e6, *[-x for x in right[1:]])
    )
    assert found.point[0] > 0.6
    np.testing.assert_allclose(found.point[1:], [0.1, 0.5], atol=0.15)


def test_too_few_make_no_mean() -> None:
    policy = rules(min_evaluators=2)
    search = begun(policy, 1)
    for _ in range(2):
        search = coefficients.advance(search, policy, 0, {"a": 1.0}, 1)
    assert slopes.combined(search, policy, {}) is None
    assert slopes.combined(search, policy, {"a": (0.1,)}) is None
    assert slopes.combined(search, policy, {"a": (0.1,), "b": (0.3,)}) == (1.0,)


def test_more_than_an_evaluation_holds_does_not_fit() -> None:
    policy = rules(granularity="layer")
    assert slopes.fit(begun(policy, 10, 100))
    assert not slopes.fit(begun(policy, 12, 200))
    tensors = ["x" * 240 + f".{number}.weight" for number in range(200)]
    assert not slopes.fit(coefficients.begin(policy, NAMES[:2], NAMES[:2], tensors, 1))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"objective": "accuracy"}, "needs an objective that has slopes"),
        ({"step": 1e-4}, "what differs less is rounding"),
        ({"lower": 0.3, "upper": 0.301}, "what differs less is rounding"),
    ],
)
def test_what_has_no_slopes_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RoundPolicy.model_validate({"merge": {"coefficients": {"method": "gradient", **wrong}}})
