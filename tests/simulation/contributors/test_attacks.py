"""What attacks make of a task vector and of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.extraction import Extraction, extract
from coldmerge.core.task_vector import TaskVector
from coldmerge.core.vector_writer import VectorWriter
from coldmerge_simulation.contributors.attacks import attack, flip_labels
from coldmerge_simulation.contributors.conduct import Attack
from tests.support import write_model

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
