"""benchmarks/cold: probes, fine-tunes and the pooled training, with a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.cold import multitask
from benchmarks.cold.measuring import Probing, Ruler, Subject
from benchmarks.cold.multitask import Heads, MultiTask
from benchmarks.cold.outcome import Score
from benchmarks.cold.sets import Item, TaskSet, read_set
from benchmarks.cold.tuning import for_all, tuned
from coldmerge_client.training import TrainConfig, TrainJob, models
from tests.tiny import FRUIT, METAL, write_bert

TUNE: dict[str, Any] = {
    "pooling": "mean",
    "lr": 3e-3,
    "batch_size": 16,
    "max_length": 16,
    "checkpoint_minutes": None,
    "evaluate": {"after_training": False},
}
RULER = Ruler(max_length=16, freeze=(), test=40, pool=60, draws=2, tune=TUNE, shots=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "model")


def task(name: str = "a") -> TaskSet:
    """Fruit or metal, in pairs with a word that says nothing."""
    words = [(FRUIT, METAL)[i % 2][i // 2 % 4] for i in range(140)]
    items = tuple(Item(f"some {word}", "more", i % 2) for i, word in enumerate(words))
    return TaskSet(name, Path(name), ("fruit", "metal"), items[:90], (), items[90:])


def subject(model: Path, *seeds: int) -> Subject:
    return Subject("mean", 1, "d" * 64, model, seeds)


def test_probes_pair_and_features_are_kept(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    about = subject(folder, 3, 4)
    found = Probing(about, RULER, tmp_path / "cache").score(
        task(), "seen", ("lp100", "frozen"), set()
    )
    keys = [(one.seed, one.protocol, one.draw) for one in found]
    assert keys == [
        *((seed, "lp100", draw) for seed in (3, 4) for draw in (0, 1)),
        (3, "frozen", 0),
        (4, "frozen", 0),
    ]
    for one in found:
        assert one.n == 40
        assert one.accuracy == pytest.approx(one.hits().mean(), abs=1e-6)
    assert found[-1].correct == found[-2].correct
    shutil.rmtree(folder)
    known = {found[0].key}
    again = Probing(about, RULER, tmp_path / "cache").score(task(), "seen", ("lp100",), known)
    assert again == found[1:4]


def test_fine_tunes_repeat_and_follow_their_draw(model: Path) -> None:
    def scores(number: int, seed: int) -> Score:
        (found,) = tuned(subject(model, seed), RULER, task(), "unseen", "ft100", number)
        return found

    first, again = scores(0, 5), scores(0, 6)
    assert first.hits().tolist() == again.hits().tolist()
    assert (first.n, first.protocol, first.draw, first.seed) == (40, "ft100", 0, 5)
    assert first.accuracy > 0.8
    everybody = for_all([first], (5, 6))
    assert [one.seed for one in everybody] == [5, 6]
    assert everybody[1] == replace(first, seed=6)


def test_one_layer_of_heads_is_a_head_for_each_set(model: Path) -> None:
    torch.manual_seed(0)
    body = models.load(transformers.AutoModel, model, dtype=torch.float32).eval()
    heads = Heads(body, ["a/0", "a/1", "b/x", "b/y", "b/z"]).eval()
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 9, 3]]), "attention_mask": torch.ones(2, 3)}
    logits = heads(**batch).logits.detach()
    loss = heads(labels=torch.tensor([1, 4]), **batch).loss.detach()
    apart = [
        torch.nn.functional.cross_entropy(logits[:1, :2], torch.tensor([1])),
        torch.nn.functional.cross_entropy(logits[1:, 2:], torch.tensor([2])),
    ]
    assert float(loss) == pytest.approx(float(sum(apart)) / 2, abs=1e-6)


def test_pooled_data_trains_a_body_of_the_same_names(model: Path, tmp_path: Path) -> None:
    tasks = [task("a"), replace(task("b"), labels=("no", "yes"))]
    everything = multitask.write(tasks, 1000, 1, tmp_path / "all")
    assert len(read_rows(everything)) == 2 * 72  # a fifth of each validates
    folder = multitask.write(tasks, 30, 1, tmp_path)
    rows = read_rows(folder)
    assert len(rows) == 60
    assert {row["label"] for row in rows} == {"a/fruit", "a/metal", "b/no", "b/yes"}
    config = TrainConfig.parse({**TUNE, "data": str(folder), "epochs": 1})
    trained = MultiTask(config).train(TrainJob(model, tmp_path / "run", None, config, 0))
    before, after = (
        models.load(transformers.AutoModel, place).state_dict() for place in (model, trained.folder)
    )
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_a_set_that_was_changed_has_another_digest(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "some iron", "label": i % 2}) + "\n" for i in range(120)]
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    before = read_set(tmp_path).digest()
    (tmp_path / "test.jsonl").write_text("".join([*lines[1:], lines[0]]))
    assert read_set(tmp_path).digest() != before
