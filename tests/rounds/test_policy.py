"""Durations, defaults, YAML, and the messages for what is wrong."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.errors import ConfigError
from coldmerge.rounds.policy import (
    GatePolicy,
    RoundPolicy,
    RoundTemplate,
    Schedule,
    format_duration,
    load_yaml,
    parse_duration,
    parse_template,
)

SAMPLE = """\
min_contributions: 2
max_contributions: 5
duration: 1d12h
on_quorum_missed: extend
second_contribution: refuse
merge: {method: mean, weights: examples}
gate: {min_evaluators: 2, metric: macro_f1, max_loss: 1.5, window: 90s, on_timeout: reject}
webhook: https://example.org/hook
schedule: {cron: "0 2 * * 1-5", timezone: Europe/Paris}
"""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("24h", 86400), ("7d", 604800), ("1h30m", 5400)],
)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@given(st.integers(min_value=1, max_value=10**9))
def test_durations_survive_printing(seconds: int) -> None:
    duration = timedelta(seconds=seconds)
    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize("text", ["", "0s", "-1h", "1w", "1", "h", "1.5h", " 1h", "1h ", "1 h"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_duration(text)
    assert caught.value.code == "policy.bad_duration"


def test_a_sample_is_read(tmp_path: Path) -> None:
    path = tmp_path / "round.yaml"
    path.write_text(SAMPLE)
    template = load_yaml(path)
    assert template.duration == timedelta(hours=36)
    assert template.gate is not None
    assert template.gate.window == timedelta(seconds=90)
    assert template.schedule == Schedule(cron="0 2 * * 1-5", timezone="Europe/Paris")


def test_a_policy_is_its_template_without_the_schedule() -> None:
    template = RoundTemplate(min_contributions=2, gate=None, schedule=Schedule(cron="0 2 * * *"))
    policy = template.policy()
    assert type(policy) is RoundPolicy
    assert (policy.min_contributions, policy.gate) == (2, None)


@pytest.mark.parametrize("policy", [RoundPolicy(), RoundPolicy(gate=None, duration=timedelta(1))])
def test_policies_survive_json(policy: RoundPolicy) -> None:
    assert RoundPolicy.model_validate(json.loads(json.dumps(policy.to_json()))) == policy


def test_a_round_asks_all_or_those_it_names() -> None:
    assert RoundPolicy().asks("anybody")
    policy = RoundPolicy(contributors=("a", "b", "c"))
    assert [policy.asks(name) for name in ("a", "c", "d")] == [True, True, False]
    assert RoundPolicy.model_validate(policy.to_json()) == policy


def test_a_policy_from_before_outer_optimizers_has_none() -> None:
    old = RoundPolicy.model_validate({"merge": {"method": "mean", "weights": "uniform"}})
    assert old.merge.outer == {"method": "none"}


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "round.yaml"
    path.write_text("")
    assert load_yaml(path) == RoundTemplate()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"minimum": 3}, "minimum"),
        ({"min_contributions": 0}, "min_contributions"),
        ({"min_contributions": 3, "max_contributions": 2}, "the top level"),
        ({"duration": "1w"}, "duration"),
        ({"duration": 3600}, "duration"),
        ({"gate": {"window": "soon"}}, "gate.window"),
        ({"gate": {"max_loss": float("nan")}}, "gate.max_loss"),
        ({"gate": {"on_timeout": "publish"}}, "gate.on_timeout"),
        ({"merge": {"method": "../mean"}}, "merge.method"),
        ({"merge": {"parameters": {"density": [0.2]}}}, "merge.parameters.density.str"),
        ({"merge": {"outer": {"lr": 0.7}}}, "merge.outer"),
        ({"merge": {"outer": {"method": 7}}}, "merge.outer"),
        ({"merge": {"outer": "nesterov"}}, "merge.outer"),
        ({"contributors": []}, "contributors"),
        ({"contributors": ["a", "b", "not a name"]}, "contributors.2"),
        ({"contributors": ["a", "b", "b"]}, "the top level"),
        ({"webhook": "file:///etc/passwd"}, "webhook"),
        ({"mode": "blind"}, "mode"),
        ({"schedule": {"cron": "daily"}}, "schedule.cron"),
        ({"schedule": {"cron": "0 2 * * *", "timezone": "Mars/One"}}, "schedule.timezone"),
        ({"schedule": {"cron": "0 2 * * *", "timezone": "../passwd"}}, "schedule.timezone"),
        (["a", "list"], "the top level"),
    ],
)
def test_what_is_wrong_is_named(values: object, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_template(values, "round.yaml")
    assert caught.value.code == "policy.invalid"
    assert caught.value.ids == {"key": key}


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", None])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "round.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert caught.value.code == "policy.unreadable"


@pytest.mark.parametrize(
    ("policy", "limit"),
    [
        (RoundPolicy(min_contributions=3), 3),
        (RoundPolicy(min_contributions=3, max_contributions=5), 5),
        (RoundPolicy(min_contributions=3, duration=timedelta(hours=1)), None),
        (RoundPolicy(min_contributions=3, max_contributions=5, duration=timedelta(hours=1)), 5),
    ],
)
def test_when_the_count_seals(policy: RoundPolicy, limit: int | None) -> None:
    assert policy.seals_at == limit


def test_one_liar_holds_no_veto_by_default() -> None:
    assert GatePolicy().max_vetoes == 1
