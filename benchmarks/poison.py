"""How far one attacker moves a merge: `python -m benchmarks.poison --scale 1000`.

A coordinator's own path from frozen inputs to a candidate (reference norm, clip factors,
merge), on random task vectors of about one norm, with one of them `--scale` times as long.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt

from coldmerge.core.dtypes import Floats32
from coldmerge.merging import Input, Job, Pool, merger_class, uniform
from coldmerge.screening.bounds import clip_factors, reference_norm
from coldmerge.screening.scaled import scaled

CLIP = 2.0
NAME = "w"


class Vector:
    """One random tensor as a task vector."""

    base_digest = "0" * 64
    names = frozenset({NAME})

    def __init__(self, values: Floats32) -> None:
        self._values = values

    def shape(self, _name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._values.shape

    def block(self, _name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop)."""
        return self._values[start:stop].copy()

    def has_statistic(self, _name: str, _kind: str) -> bool:
        """None."""
        return False

    def statistic(self, _name: str, _kind: str, start: int, stop: int) -> Floats32:
        """None is asked for."""
        return np.zeros(stop - start, np.float32)

    @property
    def norm(self) -> float:
        """L2 norm, in float64."""
        return float(np.linalg.norm(self._values.astype(np.float64)))


def vectors(count: int, size: int, scale: float, seed: int) -> list[Vector]:
    """`count` vectors of norm about 1; the last one, the attacker's, of about `scale`."""
    draw = np.random.default_rng(seed)
    found = [draw.standard_normal(size) / np.sqrt(size) for _ in range(count)]
    found[-1] = found[-1] * scale
    return [Vector(values.astype(np.float32)) for values in found]


def merged(inputs: list[Vector], clip: float | None, method: str) -> npt.NDArray[np.float64]:
    """The merged delta of a round with these inputs, as the worker makes it."""
    keys = [f"{at:064x}" for at in range(len(inputs))]
    norms = {key: vector.norm for key, vector in zip(keys, inputs, strict=True)}
    factors = clip_factors(norms, reference_norm(norms.values()), clip)
    sources = [
        Input(key, scaled(vector, factors[key])) for key, vector in zip(keys, inputs, strict=True)
    ]
    recipe = uniform(merger_class(method), {}, [1.0] * len(inputs))
    size = inputs[0].shape(NAME)
    job = Job(Vector(np.zeros(size, np.float32)), {NAME: size}, sources, recipe)
    with Pool(2) as pool:
        job.survey(pool)
        parts = list(job.in_order(NAME, pool, job.delta))
    return np.concatenate(parts).astype(np.float64)


def share(inputs: list[Vector], clip: float | None, method: str = "mean") -> tuple[float, float]:
    """How far the attacker moves the merge, and how far it may: clip · reference / N.

    Moved: against the same round in which the attacker sent zeros and nothing else changed.
    """
    honest = [*inputs[:-1], Vector(np.zeros_like(inputs[-1].block(NAME, 0, 2**62)))]
    reference = reference_norm(vector.norm for vector in inputs) or 0.0
    moved = merged(inputs, clip, method) - merged(honest, clip, method)
    return float(np.linalg.norm(moved)), CLIP * reference / len(inputs)


def main(arguments: list[str] | None = None) -> int:
    """Print what one attacker moves, with the clip and without."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poison", description=__doc__)
    parser.add_argument("--scale", type=float, default=1000.0, help="length of the attack")
    parser.add_argument("--inputs", type=int, default=10, help="contributions, the attacker's too")
    parser.add_argument("--size", type=int, default=10**6, help="elements of each")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    inputs = vectors(options.inputs, options.size, options.scale, options.seed)
    print(f"{options.inputs} contributions, one of them {options.scale:g} times as long")
    within = True
    for clip, method in ((None, "mean"), (CLIP, "mean"), (CLIP, "geometric_median")):
        moved, allowed = share(inputs, clip, method)
        word = "no clip" if clip is None else f"clip {clip:g}"
        within &= (clip, method) != (CLIP, "mean") or moved <= allowed * (1 + 1e-6)
        print(
            f"{method:17} {word:8} the attacker moves the merge by {moved:.6g}, "
            f"{moved / allowed:.6g} of the largest admissible share ({allowed:.6g})"
        )
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
