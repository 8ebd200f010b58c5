from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ConfigError
from coldmerge.core.extraction import Extraction, extract
from coldmerge.core.task_vector import TaskVector
from coldmerge.core.vector_writer import VectorWriter
from coldmerge_simulation.contributors.attacks import attack, flip_labels
from coldmerge_simulation.contributors.conduct import (
    Attack,
    Attacker,
    Durations,
    Participation,
    attacking,
    plan,
)
from tests.support import write_model

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


ROWS = 40_000
"""A tensor of several blocks."""


@pytest.fixture
def extracted(tmp_path: Path) -> Extraction:
    draw = np.random.default_rng(0)
    base = {
        "a.weight": draw.standard_normal((ROWS, 16)).astype(np.float32),
        "b.bias": np.ones(7, np.float32),
    }
    moved = draw.standard_normal((ROWS, 16)).astype(np.float32)
    tuned = {"a.weight": base["a.weight"] + moved, "b.bias": base["b.bias"] + np.float32(0.5)}
    found = Checkpoint.open(write_model(tmp_path / "base", base))
    folder = write_model(tmp_path / "tuned", tuned)
    return extract(found, folder, tmp_path / "payload.safetensors", base_digest="0" * 64)


def values(vector: TaskVector, name: str = "a.weight") -> Any:
    return vector.block(name, 0, ROWS * 16)


@pytest.mark.parametrize(
    ("kind", "strength", "factor"),
    [
        ("sign_flip", None, -1.0),
        ("sign_flip", 3.0, -3.0),
        ("scale", None, 10.0),
        ("scale", 0.5, 0.5),
    ],
)
def test_flips_and_scales_are_exact_and_say_their_norm(
    extracted: Extraction, kind: Any, strength: float | None, factor: float
) -> None:
    before, entries, norm = values(extracted.task_vector), extracted.entries, extracted.norm
    sent = attack(Attack(kind=kind, strength=strength), extracted, 0)
    np.testing.assert_array_equal(values(sent.task_vector), before * np.float32(factor))
    assert sent.norm == pytest.approx(abs(factor) * norm, rel=1e-6)
    assert [entry.name for entry in sent.entries] == [entry.name for entry in entries]
    assert all(a.sha256 != b.sha256 for a, b in zip(entries, sent.entries, strict=True))
    assert sent.task_vector.base_digest == "0" * 64
    assert TaskVector.open(extracted.task_vector.path).entries() == sent.entries


def test_noise_is_as_large_as_it_says_and_the_same_again(extracted: Extraction) -> None:
    before, path = values(extracted.task_vector), extracted.task_vector.path
    honest = path.read_bytes()
    sent = attack(Attack(kind="noise", strength=2.0), extracted, 7)
    noise = values(sent.task_vector) - before
    assert np.sqrt((noise**2).mean()) == pytest.approx(2 * np.sqrt((before**2).mean()), rel=0.01)
    assert abs(np.corrcoef(noise, before)[0, 1]) < 0.01
    first = path.read_bytes()
    found = []
    for seed in (7, 8):
        path.write_bytes(honest)
        again = extract_again(path, extracted)
        attack(Attack(kind="noise", strength=2.0), again, seed)
        found.append(path.read_bytes())
    assert found[0] == first != found[1]


def extract_again(path: Path, like: Extraction) -> Extraction:
    return Extraction(
        TaskVector.open(path), like.kept_home, like.unchanged, like.missing, like.norm
    )


def test_nan_is_in_every_tensor_and_the_norm_stays_a_number(extracted: Extraction) -> None:
    sent = attack(Attack(kind="nan"), extracted, 0)
    for name, count in (("a.weight", ROWS * 16), ("b.bias", 7)):
        there = np.isnan(sent.task_vector.block(name, 0, count))
        assert there[0]
        assert there.sum() == 1
    assert sent.norm == extracted.norm


def test_a_scale_beyond_float32_is_infinite(extracted: Extraction) -> None:
    sent = attack(Attack(kind="scale", strength=1e30), extracted, 0)
    assert np.isfinite(values(sent.task_vector)).all()
    again = attack(Attack(kind="scale", strength=1e30), sent, 0)
    assert np.isinf(values(again.task_vector)).any()
    assert np.isfinite(again.norm)


def test_labels_are_flipped_in_training_alone(tmp_path: Path) -> None:
    folder = tmp_path / "org-1"
    folder.mkdir()
    rows = [{"text": f"{n}", "label": n % 3} for n in range(30)]
    for part in ("train", "validation"):
        text = "\n".join(json.dumps(row) for row in rows) + "\n"
        (folder / f"{part}.jsonl").write_text(text)

    def flipped(strength: float, seed: int = 0) -> list[int]:
        out = flip_labels(
            Attack(kind="label_flip", strength=strength), folder, tmp_path / "out", seed
        )
        assert (out / "validation.jsonl").read_bytes() == (folder / "validation.jsonl").read_bytes()
        found = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        return [row["label"] for row in found]

    whole = flipped(1.0)
    assert all(label != n % 3 for n, label in enumerate(whole))
    assert len({(n % 3, label) for n, label in enumerate(whole)}) == 6, "no renaming of labels"
    half = flipped(0.5)
    assert sum(label != n % 3 for n, label in enumerate(half)) == 15
    assert half == flipped(0.5) != flipped(0.5, 1)


def test_an_attack_on_data_leaves_the_task_vector(extracted: Extraction) -> None:
    before = extracted.task_vector.path.read_bytes()
    assert attack(Attack(kind="label_flip"), extracted, 0) is extracted
    assert extracted.task_vector.path.read_bytes() == before


def test_adapters_are_attacked_as_adapters(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"a.lora_A": (2, 4), "a.lora_B": (3, 2), "b": (7,)}
    path = tmp_path / "payload.safetensors"
    facts: Any = {"kind": "lora", "encoding": "bf16", "base_digest": "0" * 64}
    with VectorWriter(path, shapes.items(), scaling={"a": 0.5}, **facts) as writer:
        for key, shape in shapes.items():
            writer.append(draw.standard_normal(shape).astype(np.float32).ravel())
            writer.keep(key, shape)
    honest = Extraction(writer.open(), (), (), (), 1.0)
    delta, plain = honest.task_vector.block("a", 0, 12), honest.task_vector.block("b", 0, 7)
    sent = attack(Attack(kind="sign_flip", strength=2), honest, 0).task_vector
    assert (sent.kind, sent.encoding, sent.scaling) == ("lora", "bf16", {"a": -1.0})
    np.testing.assert_array_equal(sent.block("a", 0, 12), -2 * delta)
    np.testing.assert_array_equal(sent.block("b", 0, 7), -2 * plain)
    noisy = attack(Attack(kind="noise"), extract_again(path, honest), 0).task_vector
    assert not np.array_equal(noisy.block("a", 0, 12), -2 * delta)
