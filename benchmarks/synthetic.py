"""Models of a given size with random weights: one large embedding, many equal layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.header import TensorSpec

WIDTH = 1024
LAYER = (2 * WIDTH, 2 * WIDTH)
EMBEDDING_SHARE = 8

Array = NDArray[np.float32]


def shapes(nbytes: int) -> dict[str, tuple[int, int]]:
    """Tensors of about `nbytes` in fp32, at least one layer and an embedding."""
    rows = max(1, nbytes // EMBEDDING_SHARE // (4 * WIDTH))
    left = nbytes - 4 * WIDTH * rows
    found = {"embeddings.weight": (rows, WIDTH)}
    side = LAYER[0]
    while 4 * side * side > left:
        side //= 2
    for number in range(left // (4 * side * side)):
        found[f"layers.{number:04}.weight"] = (side, side)
    return dict(sorted(found.items()))


def _base(shape: tuple[int, int], place: int) -> Array:
    return np.random.default_rng([0, place]).random(shape, np.float32) - np.float32(0.5)


def weights(nbytes: int, seed: int | None) -> Iterator[tuple[str, Array]]:
    """Each tensor of the base (seed None), or of a fine-tune of it: every value moved."""
    for place, (name, shape) in enumerate(shapes(nbytes).items()):
        base = _base(shape, place)
        if seed is not None:
            move = np.random.default_rng([seed, place]).random(shape, np.float32)
            base += np.float32(1e-3) * (move - np.float32(0.5))
        yield name, base


def write(folder: Path, nbytes: int, seed: int | None = None) -> Path:
    """A Hugging Face folder of these weights, one tensor in memory at a time."""
    with CheckpointWriter(folder) as writer:
        writer.declare(
            [
                TensorSpec(name, "F32", shape, 0, 4 * shape[0] * shape[1])
                for name, shape in shapes(nbytes).items()
            ]
        )
        for name, array in weights(nbytes, seed):
            writer.write(name, array)
        writer.write_file("config.json", b'{"model_type": "benchmark"}')
    return folder
