"""SAM against steps computed by hand, and what it must not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from coldmerge.core.errors import ConfigError
from coldmerge.core.progress import silent
from coldmerge_client.training import TrainConfig, TrainJob, load_trainer
from coldmerge_client.training.fit import fit
from coldmerge_client.training.sam import ahead

Configure = Callable[..., TrainConfig]
Job = Callable[..., TrainJob]

RHO, LR = 0.3, 0.05


def test_the_second_gradient_is_that_of_the_worst_place_nearby() -> None:
    """On ½·wᵀAw, whose gradient is Aw everywhere, with the weights in two tensors."""
    draw = np.random.default_rng(0)
    half = draw.normal(size=(5, 5))
    matrix, start = half @ half.T, draw.normal(size=5)
    known = torch.from_numpy(matrix)
    first = torch.nn.Parameter(torch.from_numpy(start[:2].copy()))
    second = torch.nn.Parameter(torch.from_numpy(start[2:].copy()))
    idle = torch.nn.Parameter(torch.ones(3))

    def backward() -> None:
        weights = torch.cat([first, second])
        (weights @ known @ weights / 2).backward()

    backward()
    with ahead([first, second, idle], RHO):
        there = np.concatenate([first.detach().numpy(), second.detach().numpy()])
        backward()
    slope = matrix @ start
    worst = start + RHO * slope / np.linalg.norm(slope)
    np.testing.assert_allclose(there, worst, rtol=1e-12)
    assert first.grad is not None
    assert second.grad is not None
    found = np.concatenate([first.grad.numpy(), second.grad.numpy()])
    np.testing.assert_allclose(found, matrix @ worst, rtol=1e-12)
    assert np.concatenate([first.detach(), second.detach()]).tobytes() == start.tobytes()
    assert idle.grad is None


def test_a_gradient_of_zero_moves_nothing() -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    weights.grad = torch.zeros(3)
    with ahead([weights], RHO):
        assert weights.tolist() == [1, 1, 1]


class Regression(torch.nn.Module):
    """½·mean((xw − y)²), w from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((x @ self.weights - labels) ** 2).mean() / 2}


def by_hand(x: Any, y: Any, steps: int) -> Any:
    """SAM with AdamW (no decay), a rate that falls to zero, gradients clipped to length 1."""

    def slope(w: Any) -> Any:
        return x.T @ (x @ w - y) / len(y)

    w, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for step in range(1, steps + 1):
        g = slope(w)
        g = slope(w + RHO * g / np.linalg.norm(g))
        g = g / max(1, np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = LR * (1 - (step - 1) / steps)
        w = w - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return w


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 4)])
def test_steps_are_those_computed_by_hand(
    configure: Configure, tmp_path: Path, batch: int, accumulate: int
) -> None:
    """Each update sees all eight examples, in one batch or in four that are accumulated."""
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(8, 3)), draw.normal(size=8)
    examples = [
        {"x": torch.tensor(row, dtype=torch.float32), "labels": torch.tensor(np.float32(label))}
        for row, label in zip(x, y, strict=True)
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    model = Regression()
    config = configure(sam={"rho": RHO}, lr=LR, batch_size=batch, accumulate=accumulate, epochs=5)
    fit(model, examples, collate, [], config, 3, tmp_path / "run", silent)
    np.testing.assert_allclose(model.weights.detach(), by_hand(x, y, 5), rtol=1e-5)
    assert np.linalg.norm(model.weights.detach()) > 0.1


def tuned(job: TrainJob) -> dict[str, torch.Tensor]:
    folder = load_trainer(job.config).train(job).folder
    (path,) = folder.glob("*model.safetensors")
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 2},
        {"method": "lora", "lora": {"target_modules": ["query", "value"], "dropout": 0.1}},
    ],
    ids=["full", "lora"],
)
def test_without_a_radius_it_is_training_as_ever(
    configure: Configure, job: Job, settings: dict[str, Any]
) -> None:
    """The second pass draws the same dropout, and leaves the random numbers where they were."""
    plain = tuned(job(configure(**settings), "plain"))
    still = tuned(job(configure(**settings, sam={"rho": 1e-30}), "still"))
    far = tuned(job(configure(**settings, sam={"rho": 0.05}, bf16=True), "far"))
    assert all(plain[name].equal(still[name]) for name in plain)
    assert not all(plain[name].equal(far[name]) for name in plain)


def test_a_radius_is_positive(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"sam\.rho"):
        configure(sam={"rho": 0})
