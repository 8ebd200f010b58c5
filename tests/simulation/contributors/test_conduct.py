from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from coldmerge.core.errors import ConfigError
from coldmerge_simulation.contributors.conduct import (
    Attack,
    Attacker,
    Durations,
    Participation,
    attacking,
    plan,
)

NAMES = tuple(f"org-{n:02d}" for n in range(1, 21))

shares = st.floats(0, 1)
durations = st.builds(
    Durations,
    distribution=st.sampled_from(["fixed", "uniform", "lognormal", "exponential"]),
    seconds=st.floats(0.01, 1e6),
    spread=st.floats(0, 1),
)
participations = st.builds(
    Participation,
    share=st.floats(0.01, 1),
    dropout=shares,
    stragglers=st.builds(dict, share=shares, slowdown=st.floats(1, 100)),
    duration=durations,
)
attackers = st.lists(
    st.builds(
        Attacker,
        kind=st.sampled_from(["sign_flip", "scale", "noise", "label_flip", "nan"]),
        count=st.integers(1, 4),
        from_round=st.integers(1, 5),
    ),
    max_size=3,
)


@given(participations, attackers, st.integers(0, 2**31), st.integers(1, 9), st.randoms())
@settings(max_examples=150, deadline=None)
def test_a_plan_is_a_function_of_the_seed_alone(
    how: Participation, some: list[Attacker], seed: int, number: int, chance: Any
) -> None:
    found = plan(how, some, seed, number, NAMES)
    shuffled = list(NAMES)
    chance.shuffle(shuffled)
    assert plan(how, some, seed, number, shuffled) == found
    names = [turn.name for turn in found.turns]
    assert names == sorted(set(names))
    assert len(names) == max(1, int(how.share * len(NAMES) + 0.5))
    assert all(0 <= turn.seconds < 1e9 for turn in found.turns)
    assert {turn.name for turn in found.arrivals} == {t.name for t in found.turns if not t.drops}
    seconds = [turn.seconds for turn in found.arrivals]
    assert seconds == sorted(seconds)
    active = [one for one in some if one.from_round <= number]
    attack = [turn.attack for turn in found.turns if turn.attack]
    assert len(attack) <= sum(one.count or 0 for one in active)
    assert {one.kind for one in attack} <= {one.kind for one in active}


@given(participations, st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_who_is_slow_and_who_attacks_stays(how: Participation, seed: int) -> None:
    everybody = how.model_copy(update={"share": 1.0})
    some = [Attacker(kind="scale", count=3), Attacker(kind="nan", names=("org-05",))]
    rounds = [plan(everybody, some, seed, number, NAMES).turns for number in (1, 2, 7)]
    slow = [{turn.name for turn in turns if turn.straggler} for turns in rounds]
    bad = [{turn.name: turn.attack for turn in turns if turn.attack} for turns in rounds]
    assert slow[0] == slow[1] == slow[2]
    assert len(slow[0]) == int(how.stragglers.share * len(NAMES) + 0.5)
    assert bad[0] == bad[1] == bad[2]
    assert len(bad[0]) == 4
    assert bad[0]["org-05"] == Attack(kind="nan")


def test_shares_and_durations_come_out_over_many_rounds() -> None:
    how = Participation.model_validate(
        {
            "share": 0.5,
            "dropout": 0.3,
            "stragglers": {"share": 0.25, "slowdown": 4},
            "duration": {"seconds": 60, "spread": 0.5},
        }
    )
    turns = [turn for number in range(1, 401) for turn in plan(how, [], 3, number, NAMES).turns]
    assert len(turns) == 400 * 10
    assert np.mean([turn.drops for turn in turns]) == pytest.approx(0.3, abs=0.03)
    asked = [sum(turn.name == name for turn in turns) for name in NAMES]
    assert min(asked) > 160
    fast, slow = ([t.seconds for t in turns if t.straggler is is_slow] for is_slow in (False, True))
    assert np.median(fast) == pytest.approx(60, rel=0.05)
    assert np.median(slow) == pytest.approx(240, rel=0.08)


@pytest.mark.parametrize("kind", ["fixed", "uniform", "lognormal", "exponential"])
def test_seconds_are_the_median_of_every_distribution(kind: Any) -> None:
    how = Durations(distribution=kind, seconds=30, spread=0.5)
    assert how.at(0.5) == pytest.approx(30)
    assert 0 < how.at(1e-9) <= how.at(0.3) <= how.at(0.7) <= how.at(1 - 1e-9) < 1000


def test_an_attack_begins_in_its_round() -> None:
    late = [Attacker(kind="nan", count=20, from_round=3)]
    active = [
        sum(turn.attack is not None for turn in plan(Participation(), late, 0, n, NAMES).turns)
        for n in (1, 2, 3, 4)
    ]
    assert active == [0, 0, 20, 20]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="org-99 is no contributor"):
        attacking([Attacker(kind="nan", names=("org-99",))], 0, NAMES)
    twice = [Attacker(kind="nan", names=("org-01",)), Attacker(kind="scale", names=("org-01",))]
    with pytest.raises(ConfigError, match="org-01 is two attackers"):
        attacking(twice, 0, NAMES)
    with pytest.raises(ConfigError, match="fewer contributors than attackers"):
        attacking([Attacker(kind="nan", count=21)], 0, NAMES)
    with pytest.raises(ConfigError, match="fewer contributors than participants"):
        plan(Participation(count=21), [], 0, 1, NAMES)
    for wrong in (
        {"kind": "nan"},
        {"kind": "nan", "count": 1, "names": ["a"]},
        {"kind": "bribe", "count": 1},
        {"kind": "label_flip", "count": 1, "strength": 1.5},
        {"kind": "scale", "count": 1, "strength": 0},
    ):
        with pytest.raises(ValidationError):
            Attacker.model_validate(wrong)
    with pytest.raises(ValidationError, match="leave one out"):
        Participation(share=0.5, count=3)
    with pytest.raises(ValidationError, match="at most 1"):
        Durations(distribution="uniform", spread=2)
