"""Outer optimizers against torch.optim in float64, over many rounds, and block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.core.errors import ConfigError
from coldmerge.merging.outer import Outer, outer, outer_names

SIZE, ROUNDS = 1000, 8


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(seed: int, scale: float = 1.0) -> Floats32:
    return np.random.default_rng(seed).normal(0, scale, SIZE).astype(np.float32)


def taus() -> list[Floats64]:
    """Task vectors of eight rounds; the third is zero, and so are ten elements of each."""
    found = [draw(number, 1e-2).astype(np.float64) for number in range(1, ROUNDS + 1)]
    found[2][:] = 0
    for tau in found:
        tau[:10] = 0
    return found


def run(
    optimizer: Outer, theta: Floats32, block: int = SIZE
) -> tuple[list[Floats32], dict[str, Floats32]]:
    """The weights after each round, as a worker computes them: slots and θ rounded to float32."""
    slots = {slot: optimizer.fresh(slot, theta) for slot in optimizer.remembers}
    path = []
    for number, tau in enumerate(taus(), 1):
        moved = np.empty(SIZE)
        after = {slot: np.empty(SIZE, np.float32) for slot in optimizer.remembers}
        for at in range(0, SIZE, block):
            cut = slice(at, at + block)
            held = {slot: values[cut] for slot, values in slots.items()}
            moved[cut], new = optimizer.step(tau[cut].copy(), theta[cut], held, number)
            for slot, values in new.items():
                after[slot][cut] = values
        theta, slots = (theta + moved).astype(np.float32), after
        path.append(theta)
    return path, slots


ORACLES: list[tuple[str, dict[str, Any], Callable[..., torch.optim.Optimizer]]] = [
    ("none", {}, lambda p: torch.optim.SGD(p, lr=1)),
    ("momentum", {}, lambda p: torch.optim.SGD(p, lr=1, momentum=0.9)),
    (
        "momentum",
        {"lr": 0.3, "momentum": 0.5},
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5),
    ),
    ("momentum", {"lr": 0.3, "momentum": 0}, lambda p: torch.optim.SGD(p, lr=0.3)),
    ("nesterov", {}, lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    (
        "nesterov",
        {"lr": 0.2, "momentum": 0.8},
        lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, nesterov=True),
    ),
    ("adam", {}, lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.99), eps=1e-3)),
    (
        "adam",
        {"lr": 0.01, "beta1": 0.8, "beta2": 0.999, "eps": 1e-8},
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.999), eps=1e-8),
    ),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), ORACLES)
def test_every_step_is_that_of_torch_to_float32_rounding(
    name: str, parameters: dict[str, Any], oracle: Callable[..., torch.optim.Optimizer]
) -> None:
    start = draw(99)
    weights = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64)))
    optimizer = oracle([weights])
    path, _ = run(outer(name, parameters), start)
    for number, (theta, tau) in enumerate(zip(path, taus(), strict=True), 1):
        weights.grad = torch.from_numpy(-tau)
        optimizer.step()
        expected = weights.detach().numpy()
        # One rounding of θ a round, half a step of float32 each, and those of the slots.
        bound = number * 2.0**-23 * np.maximum(np.abs(expected), 0.1)
        assert np.all(np.abs(theta - expected) <= bound), number


def test_slow_weights_follow_the_sum_of_all_task_vectors() -> None:
    start, keep = draw(99), 0.75
    path, slots = run(outer("ema", {"momentum": keep}), start)
    slow = torch.from_numpy(start.astype(np.float64))
    fast = slow.clone()
    for theta, tau in zip(path, taus(), strict=True):
        fast = fast + torch.from_numpy(tau)
        slow = torch.lerp(fast, slow, keep)
        np.testing.assert_allclose(theta, slow.numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(slots["fast"], fast.numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(outer("ema", {"momentum": 0}), start)[0][-1], fast, atol=2e-6)


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_an_average_of_releases_holds_what_the_rules_page_says(keep: float) -> None:
    """After t rounds: θ₀ + Σ (1 − m^(t−s+1))·τₛ, in NumPy and without the optimizer's recursion."""
    start = draw(99)
    path, _ = run(outer("ema", {"momentum": keep}), start)
    steps = np.stack(taus())
    for t, theta in enumerate(path, 1):
        arrived = 1 - keep ** np.arange(t, 0, -1)
        np.testing.assert_allclose(theta, start + arrived @ steps[:t], rtol=0, atol=2e-6)
    sums = start + np.cumsum(steps, axis=0)
    shares = (1 - keep) * keep ** np.arange(ROUNDS - 1, -1, -1)
    average = keep**ROUNDS * start + shares @ sums
    np.testing.assert_allclose(path[-1], average, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", outer_names())
def test_blocks_do_not_change_a_bit_and_zeros_do_not_move(name: str) -> None:
    start = draw(99)
    whole, slots = run(outer(name, {}), start)
    parts, others = run(outer(name, {}), start, block=7)
    assert [theta.tobytes() for theta in whole] == [theta.tobytes() for theta in parts]
    assert {k: v.tobytes() for k, v in slots.items()} == {k: v.tobytes() for k, v in others.items()}
    assert whole[-1][:10].tobytes() == start[:10].tobytes()


def test_without_an_optimizer_the_task_vector_is_added_as_it_is() -> None:
    tau = draw(1).astype(np.float64)
    moved, slots = outer("none", {}).step(tau, draw(2), {}, 1)
    assert (moved is tau, slots) == (True, {})


@pytest.mark.parametrize(
    ("name", "parameters", "parameter"),
    [
        ("none", {"lr": 1}, "lr"),
        ("nesterov", {"lr": 0}, "lr"),
        ("nesterov", {"momentum": 1}, "momentum"),
        ("momentum", {"beta1": 0.9}, "beta1"),
        ("adam", {"eps": 0.0}, "eps"),
        ("adam", {"beta2": float("nan")}, "beta2"),
        ("ema", {"momentum": -0.1}, "momentum"),
    ],
)
def test_wrong_parameters_are_named(name: str, parameters: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ConfigError) as caught:
        outer(name, parameters)
    assert caught.value.code == "outer.bad_parameter"
    assert caught.value.ids["parameter"] == parameter


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no outer optimizer lion") as caught:
        outer("lion", {})
    assert caught.value.code == "outer.unknown_method"
