"""What staleness costs, when the next round opens, and policies that make no sense."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.errors import ConfigError
from coldmerge.rounds.continuous import LONGEST_PAUSE, Ended, discount, reopens_at
from coldmerge.rounds.policy import ContinuousPolicy, RoundPolicy, parse_template
from coldmerge.rounds.state import Contributed, FreezeInputs, State, open_view, transition
from coldmerge.screening.bounds import clip_factor

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAILED = st.sampled_from([State.REJECTED, State.ABANDONED])
EXPONENTS = st.floats(min_value=0, max_value=10)


@given(st.integers(min_value=0, max_value=100), EXPONENTS)
def test_a_discount_never_adds_and_falls_with_staleness(staleness: int, exponent: float) -> None:
    policy = ContinuousPolicy(discount=exponent)
    now, later = discount(staleness, policy), discount(staleness + 1, policy)
    assert 0 < later <= now <= 1
    assert discount(0, policy) == 1.0
    assert now == pytest.approx((1 + staleness) ** -exponent)


def test_the_default_is_one_over_the_root() -> None:
    policy = ContinuousPolicy()
    assert [discount(s, policy) for s in (0, 1, 3)] == pytest.approx([1.0, 0.5**0.5, 0.5])


@given(
    st.floats(min_value=0, max_value=1e30),
    st.floats(min_value=1e-6, max_value=1e6),
    st.integers(min_value=0, max_value=100),
    EXPONENTS,
)
def test_no_choice_of_base_gets_past_the_clip(
    norm: float, reference: float, staleness: int, exponent: float
) -> None:
    factor = clip_factor(norm, reference, 2.0)
    counted = norm * factor * discount(staleness, ContinuousPolicy(discount=exponent))
    assert counted <= norm * factor
    assert counted <= 2.0 * reference * (1 + 1e-12)


def test_a_round_follows_at_once_on_one_that_was_published() -> None:
    policy = ContinuousPolicy()
    assert reopens_at(policy, []) is None
    assert reopens_at(policy, [Ended(State.PUBLISHED, NOW), Ended(State.REJECTED, NOW)]) is None


@given(st.lists(FAILED, min_size=1, max_size=40), st.integers(min_value=1, max_value=10**7))
def test_each_failure_in_a_row_doubles_the_pause_up_to_a_day(
    failures: list[State], seconds: int
) -> None:
    pause = timedelta(seconds=seconds)
    policy = ContinuousPolicy(pause=pause)
    ended = [Ended(state, NOW - timedelta(hours=at)) for at, state in enumerate(failures)]
    opens = reopens_at(policy, [*ended, Ended(State.PUBLISHED, NOW)])
    assert opens is not None
    doubled = min(seconds * 2 ** (len(failures) - 1), int(LONGEST_PAUSE.total_seconds()))
    expected = max(pause, timedelta(seconds=doubled))
    assert opens - NOW == expected
    assert opens == reopens_at(policy, ended), "a release before them changes nothing"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_contributions": 1}, "at least 2"),
        ({"min_contributions": 2, "max_contributions": 3}, "leave max_contributions out"),
        ({"duration": "1h"}, "leave duration out"),
        ({"schedule": {"cron": "0 6 * * *"}}, "leave schedule out"),
        ({"continuous": {"max_staleness": -1}}, "continuous.max_staleness"),
        ({"continuous": {"discount": 11}}, "continuous.discount"),
        ({"continuous": {"discount": float("nan")}}, "continuous.discount"),
        ({"continuous": {"staleness": 1}}, "continuous.staleness"),
    ],
)
def test_what_does_not_go_together_is_said(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_template({"continuous": {}, **values}, "x")
    assert caught.value.code == "policy.invalid"
    assert said in caught.value.message


def test_a_continuous_policy_survives_json() -> None:
    values = {"min_contributions": 2, "max_contributions": 2, "continuous": {"pause": "90s"}}
    policy = parse_template(values, "x").policy()
    assert policy.continuous == ContinuousPolicy(pause=timedelta(seconds=90))
    assert RoundPolicy.model_validate(policy.to_json()) == policy
    assert RoundPolicy.model_validate({"min_contributions": 1}).continuous is None


def test_it_seals_with_the_kth_contribution() -> None:
    policy = RoundPolicy(min_contributions=2, gate=None, continuous=ContinuousPolicy())
    view = open_view("round-1", "m", policy, NOW)
    assert view.closes_at is None
    one = view.__class__(**{**vars(view), "contributors": ("a",)})
    assert transition(one, Contributed(), NOW) == (one, ())
    two = view.__class__(**{**vars(view), "contributors": ("a", "b")})
    sealed, effects = transition(two, Contributed(), NOW)
    assert sealed.state is State.SEALED
    assert effects == (FreezeInputs(),)
