"""Simulations of models in Hugging Face folders: in full, with LoRA, past a frozen trunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from coldmerge_simulation import Simulation, simulate
from tests.simulation.settings import digests
from tests.tiny import sentences, write_bert

LORA: dict[str, Any] = {
    "method": "lora",
    "lora": {"r": 4, "target_modules": ["query", "value"]},
    "lr": 1e-2,
}
FREEZE = ["embeddings.*", "encoder.layer.[0-1].*"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and one with two tasks in it."""
    folder = tmp_path_factory.mktemp("text")
    for seed, task in enumerate(("one", "two")):
        (folder / "sets" / task).mkdir(parents=True)
        for number, part in enumerate(("train", "validation", "test")):
            rows = sentences((40, 20, 30)[number], 10 * seed + number)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "sets" / task / f"{part}.jsonl").write_text(text)
    return write_bert(folder / "bert", layers=3), folder / "sets"


def run(places: tuple[Path, Path], out: Path, engine: str = "local", **train: Any) -> Simulation:
    model, sets = places
    common = {"trainer": "sequence-classification", "pooling": "mean", "lr": 1e-3, "bf16": False}
    settings = {
        "rounds": 2,
        "model": str(model),
        "contributors": 2,
        "data": {"source": str(sets), "unseen": []},
        "train": {**common, "max_length": 16, "checkpoint_minutes": None, **train},
        "round": {"min_contributions": 2, "gate": {"max_loss": 100, "min_mean_gain": -100}},
    }
    return simulate(settings, engine=engine, out=out)


def shipped(found: Simulation) -> list[int]:
    return [line["bytes"] for line in found.values["rounds"]]


def test_adapters_are_shipped_merged_and_measured(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    full = run(places, tmp_path / "full")
    lora = run(places, tmp_path / "lora", **LORA)
    for found in (full, lora):
        assert [line["state"] for line in found.values["rounds"]] == ["PUBLISHED"] * 2
        assert len(set(digests(found))) == 3
        assert found.values["releases"][2]["seen"]["mean"] > 20
    assert max(shipped(lora)) < min(shipped(full)) / 4


def test_a_trunk_is_computed_once(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Of all examples: of the training and validation data, and of those that a probe is given."""
    found = run(places, tmp_path / "run", freeze=FREEZE)
    for home in (found.folder / "homes").iterdir():
        kept = list((home / "cache").glob("trunk-*"))
        assert len(kept) == 1
        states = safetensors.torch.load_file(kept[0])["states"]
        assert len(states) > 60 * 4
    drawn = run(places, tmp_path / "drawn", freeze=FREEZE, max_examples=20)
    for home in (drawn.folder / "homes").iterdir():
        assert len(list((home / "cache").glob("trunk-*"))) == 2


@pytest.mark.slow
def test_adapters_have_the_same_digests_on_ray(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    local = run(places, tmp_path / "local", **LORA)
    ray = run(places, tmp_path / "ray", engine="ray", **LORA)
    assert digests(ray) == digests(local)
