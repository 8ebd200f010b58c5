"""What the gate decides, and when."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldmerge.core.documents import Evaluation
from coldmerge.core.errors import ManifestError
from coldmerge.rounds.gate import Verdict, check_evaluation, decide
from coldmerge.rounds.policy import GatePolicy

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CLOSES = NOW + timedelta(hours=1)
Judge = Callable[..., Evaluation]
Gains = dict[str, float]


@pytest.fixture
def verdict(judge: Judge) -> Callable[..., Verdict]:
    """Decides on gains by name; the named are the expected ones, unless told."""

    def run(
        gains: Gains, expected: str | None = None, at: datetime = NOW, **policy: Any
    ) -> Verdict:
        evaluations = [judge(name, points) for name, points in gains.items()]
        names = gains if expected is None else expected
        return decide(evaluations, GatePolicy(**policy), at, CLOSES, tuple(names)).verdict

    return run


@pytest.mark.parametrize(
    ("gains", "policy", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, {}, Verdict.PUBLISH),
        ({"a": 0.0}, {}, Verdict.PUBLISH),
        ({"a": -0.01}, {}, Verdict.REJECT),
        ({"a": 1.0, "b": -1.5}, {}, Verdict.REJECT),  # the mean falls
        ({"a": 0.9}, {"min_mean_gain": 1.0}, Verdict.REJECT),
        ({"a": 1.0}, {"min_mean_gain": 1.0}, Verdict.PUBLISH),
        ({"a": -1.0}, {"min_mean_gain": -1.0}, Verdict.PUBLISH),
        ({"a": 5.0, "b": -2.0}, {"max_vetoes": 0}, Verdict.PUBLISH),  # exactly max_loss: no veto
        ({"a": 5.0, "b": -2.01}, {"max_vetoes": 0}, Verdict.REJECT),
        ({"a": 5.0, "b": -2.01}, {"max_vetoes": 1}, Verdict.PUBLISH),  # half, but the mean holds
        ({"a": 1.0, "b": -5.0}, {}, Verdict.REJECT),  # a veto that is half the reports counts
        ({"a": -5.0}, {}, Verdict.REJECT),
        ({"a": 0.1, "b": 0.1, "liar": -50.0}, {}, Verdict.PUBLISH),  # one liar holds no veto
        ({"a": 0.1, "b": 0.1, "liar": -50.0}, {"max_vetoes": 0}, Verdict.REJECT),
        ({"a": 0.1, "b": -3.0, "c": -3.0, "d": 0.1, "e": 0.1}, {}, Verdict.REJECT),  # two are many
        (
            {"a": 40.0, "b": -3.0, "c": -3.0},
            {},
            Verdict.REJECT,
        ),  # and one fan does not outvote them
        ({"a": 3.0, "b": -3.0}, {"max_loss": 5.0}, Verdict.PUBLISH),
        ({}, {}, Verdict.WAIT),
    ],
)
def test_all_have_reported(
    verdict: Callable[..., Verdict], gains: Gains, policy: dict[str, Any], expected: Verdict
) -> None:
    assert verdict(gains, **policy) is expected


def test_it_waits_for_the_contributors_until_the_window_ends(
    verdict: Callable[..., Verdict],
) -> None:
    assert verdict({"a": 1.0}, "ab") is Verdict.WAIT
    assert verdict({"a": -9.0}, "ab") is Verdict.WAIT
    assert verdict({"a": 1.0}, "ab", at=CLOSES) is Verdict.PUBLISH
    assert verdict({"a": -1.0}, "ab", at=CLOSES) is Verdict.REJECT
    assert verdict({"a": 1.0, "other": 1.0}, "ab") is Verdict.WAIT
    assert verdict({"a": 1.0, "b": 1.0, "other": 1.0}, "ab") is Verdict.PUBLISH


def test_it_waits_for_more_evaluators_than_contributors(verdict: Callable[..., Verdict]) -> None:
    assert verdict({"a": 1.0, "b": 1.0}, "ab", min_evaluators=3) is Verdict.WAIT
    assert verdict({"a": 1.0, "b": 1.0, "c": 1.0}, "ab", min_evaluators=3) is Verdict.PUBLISH


@pytest.mark.parametrize("on_timeout", ["hold", "reject", "publish_flagged"])
def test_too_few_by_the_end(
    verdict: Callable[..., Verdict],
    on_timeout: Literal["hold", "reject", "publish_flagged"],
) -> None:
    assert verdict({}, "ab", at=CLOSES, on_timeout=on_timeout) == on_timeout
    assert (
        verdict({"a": 9.0}, "ab", at=CLOSES, on_timeout=on_timeout, min_evaluators=2) == on_timeout
    )


def test_the_metric_is_the_policys(judge: Judge) -> None:
    evaluations = [judge("a", 5.0, -1.0)]
    for metric, expected in (("accuracy", Verdict.PUBLISH), ("macro_f1", Verdict.REJECT)):
        policy = GatePolicy.model_validate({"metric": metric})
        assert decide(evaluations, policy, NOW, CLOSES, ("a",)).verdict is expected


def test_the_reasons_name_the_vetoes(judge: Judge) -> None:
    evaluations = [judge("a", 1.0), judge("b", 2.0), judge("c", -7.0)]
    decision = decide(evaluations, GatePolicy(), NOW, CLOSES, ("a", "b", "c"))
    assert decision.verdict is Verdict.PUBLISH
    assert decision.reasons == (
        "1 of at most 1 vetoes (a loss of more than 2 points of accuracy): c",
        "mean gain +1.50 points of accuracy over 2 evaluators, at least +0",
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gains=st.lists(st.floats(0, 40), min_size=2, max_size=8), lie=st.floats(-50, -2.1))
def test_no_single_liar_stops_a_candidate_that_all_others_like(
    verdict: Callable[..., Verdict], gains: list[float], lie: float
) -> None:
    honest = {f"org-{index}": points for index, points in enumerate(gains)}
    assert verdict(honest | {"liar": lie}) is Verdict.PUBLISH


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gains=st.lists(st.floats(-50, -2.1), min_size=2, max_size=8), lie=st.floats(0, 50))
def test_no_single_liar_publishes_what_all_others_veto(
    verdict: Callable[..., Verdict], gains: list[float], lie: float
) -> None:
    honest = {f"org-{index}": points for index, points in enumerate(gains)}
    assert verdict(honest | {"liar": lie}) is Verdict.REJECT


RIGHT: dict[str, Any] = {"base_digest": "a" * 64, "candidate_digest": "b" * 64, "probe_seed": 7}


@pytest.mark.parametrize("points", [-50.0, -0.01, 0.0, 12.34])
def test_an_evaluation_of_this_candidate_passes(judge: Judge, points: float) -> None:
    check_evaluation(judge("a", points), **RIGHT)


@pytest.mark.parametrize(
    "other", [{"base_digest": "c" * 64}, {"candidate_digest": "c" * 64}, {"probe_seed": 8}]
)
def test_an_evaluation_of_something_else_is_refused(judge: Judge, other: dict[str, Any]) -> None:
    with pytest.raises(ManifestError) as caught:
        check_evaluation(judge("a", 1.0), **(RIGHT | other))
    assert caught.value.code == "evaluation.mismatch"


@pytest.mark.parametrize("counts", [{"gained": 101}, {"lost": 1}, {"gained": 9000, "lost": 8900}])
def test_impossible_counts_are_refused(judge: Judge, counts: dict[str, int]) -> None:
    with pytest.raises(ManifestError) as caught:
        check_evaluation(judge("a", 1.0).model_copy(update=counts), **RIGHT)
    assert caught.value.code == "evaluation.impossible"
