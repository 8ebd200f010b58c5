"""Problems for the relatives of task arithmetic, and their common steps in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64, from_float32, to_float32
from tests.merging.sources import merged

Mask = npt.NDArray[np.bool_]
quick = settings(max_examples=40, deadline=None)


@dataclass(frozen=True)
class Problem:
    """One tensor: a base, task vectors, their weights and densities."""

    base: Floats32
    taus: list[Floats32]
    weights: list[float]
    densities: list[float]

    def run(self, method: str, parameters: Mapping[str, Any] | None = None, **how: Any) -> Floats32:
        each = [
            {"weight": weight, "density": density}
            for weight, density in zip(self.weights, self.densities, strict=True)
        ]
        taus = [{"w": tau} for tau in self.taus]
        return merged(method, {"w": self.base}, taus, parameters, each, **how)["w"]


def problem(shape: tuple[int, ...], kind: str, count: int, seed: int) -> Problem:
    """`kind`: normal, lattice (ties in magnitude), same, zeros, or bf16 (base and fine-tunes)."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    taus: list[Floats32]
    taus = [rng.standard_normal(shape).astype(np.float32) * np.float32(0.1) for _ in range(count)]
    if kind == "lattice":
        taus = [np.float32(1 / 16) * rng.integers(-3, 4, shape).astype(np.float32) for _ in taus]
    if kind == "same":
        taus = [taus[0]] * count
    if kind == "zeros":
        taus = [tau * (rng.random(shape) < 0.4).astype(np.float32) for tau in taus]
    if kind == "bf16":
        base = to_float32(from_float32(base, "BF16"))
        taus = [to_float32(from_float32(np.add(base, tau), "BF16")) - base for tau in taus]
    weights = [float(w) for w in rng.choice([1.0, 0.5, 2.0, -0.5, 0.3], count)]
    densities = [float(d) for d in rng.choice([1.0, 0.01, 0.2, 0.5, 0.9], count)]
    return Problem(base, taus, weights, densities)


shapes = st.one_of(
    st.just((1,)),
    st.tuples(st.integers(1, 60)),
    st.tuples(st.integers(1, 9), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
kinds = st.sampled_from(["normal", "lattice", "same", "zeros", "bf16"])
problems = st.builds(problem, shapes, kinds, st.integers(1, 11), st.integers(0, 999))


def check(
    found: Floats32,
    of: Problem,
    kept: Sequence[Mask],
    *,
    elects: bool,
    normalize: bool = False,
    rescale: bool = False,
    scale: float = 1.0,
) -> None:
    """Compare with the steps in float64, but where rounding decides an election."""
    rows = []
    for tau, mask, weight in zip(of.taus, kept, of.weights, strict=True):
        row = np.where(mask, tau, 0).astype(np.float64)
        before, after = np.abs(tau, dtype=np.float64).sum(), np.abs(row).sum()
        if rescale and min(before, after) >= 1e-7:
            row *= before / after
        rows.append(row * weight)
    stack: Floats64 = np.array(rows)
    open_ = np.zeros(found.shape, bool)
    votes: npt.NDArray[Any] = np.ones(stack.shape, bool)
    if elects:
        total = stack.sum(axis=0)
        open_ = np.abs(total) < 1e-5 * np.abs(stack).sum(axis=0)  # rounding decides
        votes = np.sign(stack) == np.where(total >= 0, 1, -1)
    expected = (stack * votes).sum(axis=0)
    if normalize:
        weights = np.array(of.weights).reshape(-1, *(1 for _ in found.shape))
        divisor = (weights * votes).sum(axis=0)
        open_ |= (np.abs(divisor) < 1e-4) & (divisor != 0)
        expected /= np.where(divisor == 0, 1, divisor)
    expected = of.base + scale * expected
    np.testing.assert_allclose(found[~open_], expected[~open_], rtol=2e-6, atol=2e-6)
