"""Small merges for the property tests of merge methods: awkward inputs, and what must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64
from tests.merging.sources import merged

KINDS = ("random", "zero", "same", "opposed", "lattice", "absent", "tiny")


@dataclass(frozen=True)
class Problem:
    """A base and the task vectors of some inputs; a tensor that one leaves alone is absent."""

    base: dict[str, Floats32]
    taus: list[dict[str, Floats32]]

    def stacked(self, name: str) -> Floats64:
        """τ of every input, shape (N, *shape), absent ones as zeros."""
        zero = np.zeros_like(self.base[name])
        return np.stack([tau.get(name, zero) for tau in self.taus]).astype(np.float64)

    def flat(self) -> Floats64:
        """Whole task vectors, shape (N, n)."""
        return np.concatenate(
            [self.stacked(name).reshape(len(self.taus), -1) for name in sorted(self.base)], axis=1
        )


@st.composite
def problems(
    draw: st.DrawFn, fewest: int = 1, most: int = 6, kinds: Sequence[str] = KINDS
) -> Problem:
    """Three tensors, one of them with a bf16 base, and inputs of the given kinds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    side = st.integers(1, 9)
    shapes = {"m": (draw(side), draw(side)), "v": (draw(side),), "c": (2, draw(side), 3)}
    base = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    base["m"] = base["m"].astype(ml_dtypes.bfloat16).astype(np.float32)
    taus: list[dict[str, Floats32]] = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=fewest, max_size=most)):
        tau = {}
        for name, shape in shapes.items():
            if kind == "lattice":
                tau[name] = (rng.integers(-3, 4, shape) / 64).astype(np.float32)
            elif kind in ("same", "opposed") and taus and name in taus[-1]:
                tau[name] = taus[-1][name] * np.float32(1 if kind == "same" else -1)
            else:
                scale = {"zero": 0.0, "tiny": 1e-6}.get(kind, 0.1)
                tau[name] = rng.normal(0, scale, shape).astype(np.float32)
        if kind == "absent":
            del tau[draw(st.sampled_from(sorted(shapes)))]
        taus.append(tau)
    taus[0] |= {name: np.full_like(x, 1 / 8) for name, x in base.items() if name not in taus[0]}
    return Problem(base, taus)


def run(
    method: str,
    problem: Problem,
    parameters: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Floats32]:
    """The merged weights, which do not depend on threads, and on blocks only in rounding."""

    def once(threads: int, block: int | None) -> dict[str, Floats32]:
        return merged(method, problem.base, problem.taus, parameters, each, threads, block)

    found = once(1, None)
    small = {threads: once(threads, 7) for threads in (1, 2)}
    for name, values in found.items():
        np.testing.assert_array_equal(small[1][name], small[2][name])
        close(small[1][name], values)
    return found


def close(found: npt.NDArray[Any], expected: npt.NDArray[Any], room: float = 3e-7) -> None:
    """Equal but for `room`, a part of the largest element."""
    scale = max(float(np.abs(expected).max(initial=0)), 1e-9)
    np.testing.assert_allclose(found, expected, rtol=0, atol=room * scale)


def close_by_tensor(
    found: Mapping[str, Floats32],
    problem: Problem,
    reference: Callable[[Floats64, Floats64], Floats64],
    room: float = 3e-7,
) -> None:
    """Compare with θ = reference(base, τ) of every tensor: shapes (*shape,) and (N, *shape)."""
    assert set(found) == set(problem.base)
    for name, values in found.items():
        expected = reference(problem.base[name].astype(np.float64), problem.stacked(name))
        close(values, expected, room)


def close_as_whole(
    found: Mapping[str, Floats32], problem: Problem, reference: Callable[[Floats64], Floats64]
) -> None:
    """Compare with base + reference(τ), whose τ are whole task vectors, shape (N, n)."""
    base = np.concatenate([problem.base[name].reshape(-1) for name in sorted(problem.base)])
    values = np.concatenate([found[name].reshape(-1) for name in sorted(problem.base)])
    close(values, base + reference(problem.flat()))


def reversed_order(problem: Problem) -> Problem:
    """The same inputs with their keys in the opposite order."""
    return Problem(problem.base, problem.taus[::-1])


def attacked(count: int = 7, size: int = 400) -> tuple[Floats32, Problem]:
    """The honest inputs' mean, and all inputs: the last sends the opposite, 100 times as long.

    Honest inputs are 1 long in a common direction, and 0.5 in one of their own.
    """
    rng = np.random.default_rng(5)
    drawn = rng.normal(0, 1, (count, size))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    honest = (drawn[0] + 0.5 * drawn[1:]).astype(np.float32)
    taus = [*honest, -100 * honest[0]]
    return honest.mean(axis=0), Problem(
        {"w": np.zeros(size, np.float32)}, [{"w": tau} for tau in taus]
    )


def astray(method: str, parameters: Mapping[str, Any] | None = None) -> float:
    """How far a method is led from the honest inputs' mean (1 long) by the attacker."""
    mean, problem = attacked()
    found = merged(method, problem.base, problem.taus, parameters)["w"]
    return float(np.linalg.norm(found - mean) / np.linalg.norm(mean))
