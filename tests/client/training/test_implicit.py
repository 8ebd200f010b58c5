"""Slopes of the probe's numbers are what the numbers do when features, or weights, move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize

from coldmerge.core.errors import ConfigError
from coldmerge.demo import digits
from coldmerge_client.training import EvaluateJob, TrainConfig, implicit, load_trainer, probe
from coldmerge_client.training.trainer import sloping

Floats = NDArray[np.float64]
STEP = 1e-4


def value(train: Floats, labels: Any, test: Floats, truth: Any, objective: str) -> float:
    """The probe's number, fitted by scipy as far as it goes."""
    mean, scale = train.mean(0), train.std()
    known, new = (train - mean) / scale, (test - mean) / scale
    kinds = labels.max() + 1
    rows = 1 if kinds == 2 else kinds

    def chances(flat: Floats, features: Floats) -> Floats:
        parts = flat.reshape(rows, -1)
        scores = features @ parts[:, :-1].T + parts[:, -1]
        scores = np.hstack([np.zeros((len(features), 1)), scores]) if rows == 1 else scores
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(scores / scores.sum(1, keepdims=True))

    def loss(flat: Floats) -> tuple[float, Floats]:
        found, parts = chances(flat, known), flat.reshape(rows, -1)
        off = found - np.eye(kinds)[labels]
        slopes = probe.STRENGTH * off[:, -rows:].T @ np.hstack([known, np.ones((len(known), 1))])
        slopes[:, :-1] += parts[:, :-1]
        right = -np.log(found[np.arange(len(labels)), labels]).sum()
        return float(probe.STRENGTH * right + (parts[:, :-1] ** 2).sum() / 2), slopes.ravel()

    start = np.zeros(rows * (train.shape[1] + 1))
    options = {"gtol": 1e-11, "maxiter": 3000}
    found = chances(minimize(loss, start, jac=True, method="BFGS", options=options).x, new)
    if objective == "entropy":
        return float(-(found * np.log(np.maximum(found, probe.UNHEARD))).sum(1).mean())
    right = [found[i, k] if k < kinds else 0.0 for i, k in enumerate(truth)]
    return float(-np.log(np.maximum(right, probe.UNHEARD)).mean())


@pytest.mark.parametrize("objective", ["loss", "entropy"])
@pytest.mark.parametrize("kinds", [2, 4])
def test_pulls_are_the_slopes_of_a_probe_that_is_fitted_again(kinds: int, objective: str) -> None:
    draw = np.random.default_rng(kinds)
    labels, truth = draw.integers(0, kinds, 50), draw.integers(0, kinds + 1, 20)
    labels[:kinds] = range(kinds)
    centres = draw.normal(size=(kinds + 1, 5))
    train, test = (draw.normal(size=(len(k), 5)) + centres[k] for k in (labels, truth))
    found = implicit.pulls(
        train.astype(np.float32), labels, test.astype(np.float32), truth, 0, objective
    )
    for _ in range(3):
        moves = [draw.normal(size=part.shape) for part in (train, test)]
        ends = [
            value(train + by * moves[0], labels, test + by * moves[1], truth, objective)
            for by in (STEP, -STEP)
        ]
        slope = sum(float((p * m).sum()) for p, m in zip(found, moves, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=2e-3, abs=2e-5)


Tensors = dict[str, NDArray[np.float32]]


def moved(release: Path, out: Path, by: float, way: Tensors) -> Path:
    """The release, `by` along a way."""
    out.mkdir()
    tensors = load_file(release / "model.safetensors")
    for name, step in way.items():
        tensors[name] = (tensors[name] + by * step.astype(np.float64)).astype(np.float32)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for path in release.iterdir():
        if path.suffix == ".json":
            (out / path.name).write_bytes(path.read_bytes())
    return out


def check(release: Path, config: TrainConfig, out: Path) -> None:
    """Along its slopes a number rises as they say: by a hundredth of it, there and back."""
    trainer = load_trainer(config)
    here = trainer.predict(EvaluateJob(release, config, 0))
    for objective in ("loss", "entropy"):
        way = dict(sloping(trainer, config).gradient(EvaluateJob(release, config, 0), objective))
        square = sum(float((step.astype(np.float64) ** 2).sum()) for step in way.values())
        rise = 0.01 * float(getattr(here, objective))
        ends = [
            trainer.predict(
                EvaluateJob(moved(release, out / f"{objective}{by}", by, way), config, 0)
            )
            for by in (rise / square, -rise / square)
        ]
        got = (getattr(ends[0], objective) - getattr(ends[1], objective)) / 2
        assert got == pytest.approx(rise, rel=0.03)


def test_an_encoders_slopes_are_what_its_numbers_do(
    bert: Path, tmp_path: Path, configure: Callable[..., TrainConfig]
) -> None:
    """Those of layers that are frozen in training, too: others may train them."""
    config = configure(trainer="sequence-classification", freeze=["embeddings.*"])
    check(bert, config, tmp_path)
    found = sloping(load_trainer(config), config).gradient(EvaluateJob(bert, config, 0), "loss")
    base = load_file(bert / "model.safetensors")
    assert {name.split(".")[0] for name in found} == {"embeddings", "encoder"}
    assert all(found[name].shape == base[name].shape for name in found)


def test_the_digits_slopes_are_what_their_numbers_do(tmp_path: Path) -> None:
    data = digits.task("digits-2345").save(tmp_path / "data")
    config = TrainConfig.parse({"trainer": digits.TRAINER, "data": str(data), "threads": 1})
    check(digits.pretrain(tmp_path / "base", seed=0), config, tmp_path)


def test_a_trainer_without_slopes_is_told_so(tmp_path: Path) -> None:
    config = TrainConfig.parse({"trainer": "causal-lm", "data": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        sloping(load_trainer(config), config)
    assert caught.value.code == "training.no_slopes"
