from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coldmerge.core.errors import DataError
from coldmerge.demo import digits
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import EvaluateJob, TrainJob, load_trainer


def config(folder: Path) -> TrainConfig:
    data = digits.task("digits-234").save(folder / "data")
    raw = {"trainer": digits.TRAINER, "data": str(data), "epochs": 2, "lr": 1e-3, "threads": 1}
    return TrainConfig.parse(raw)


def test_organizations_share_kinds_not_images() -> None:
    seen = [digits.task(name) for name in digits.SEEN]
    images = [
        {example.content for example in (*task.train, *task.validation, *task.test)}
        for task in seen
    ]
    assert sum(map(len, images)) == len(set().union(*images))
    assert digits.task("digits-789").labels == ("7", "8", "9")


@pytest.mark.parametrize("name", ["digits-2", "digits-22", "digits-2x", "letters-ab", "digits"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DataError) as caught:
        digits.task(name)
    assert caught.value.code == "demo.unknown_digits"


def test_training_is_reproducible_and_keeps_its_head(tmp_path: Path) -> None:
    base = digits.pretrain(tmp_path / "base", seed=0)
    chosen = config(tmp_path)
    trainer = load_trainer(chosen)
    runs = [
        trainer.train(TrainJob(base, tmp_path / f"out-{n}", None, chosen, seed=3)) for n in (1, 2)
    ]
    one, two = (load_file(run.folder / "model.safetensors") for run in runs)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    before = load_file(base / "model.safetensors")
    assert sorted(one) == sorted(before)
    assert all(not np.array_equal(one[name], before[name]) for name in one)
    assert sum(array.size for array in one.values()) < 25_000
    again = trainer.train(TrainJob(base, tmp_path / "out-3", runs[0].head, chosen, seed=3))
    assert again.metrics["train_loss"] < runs[0].metrics["train_loss"]


def test_flat_minima_are_looked_for_where_asked(tmp_path: Path) -> None:
    base = digits.pretrain(tmp_path / "base", seed=0)
    plain = config(tmp_path)
    found = []
    for name, sam in (("plain", None), ("still", {"rho": 1e-30}), ("far", {"rho": 0.5})):
        chosen = TrainConfig.parse({**plain.model_dump(), "sam": sam})
        run = load_trainer(chosen).train(TrainJob(base, tmp_path / name, None, chosen, seed=3))
        found.append(load_file(run.folder / "model.safetensors")["dense.weight"])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_predictions_are_of_the_validation_part(tmp_path: Path) -> None:
    base = digits.pretrain(tmp_path / "base", seed=0)
    chosen = config(tmp_path)
    found = load_trainer(chosen).predict(EvaluateJob(base, chosen, seed=1))
    validation = digits.task("digits-234").validation
    assert found.labels.tolist() == [example.label for example in validation]
    assert (found.predicted == found.labels).mean() > 0.6
