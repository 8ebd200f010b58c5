"""Random numbers of a merge: drawn by place, so they depend on no block, thread or machine."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]

_STEP = 8
"""32-bit numbers that one step of the Philox counter gives."""


def bits(seed: int, name: str, key: str, start: int, stop: int) -> Bits:
    """Uniform 32-bit numbers for elements [start, stop) of tensor `name` of input `key`.

    Element by element the same for every range that holds it. Philox 4x64 counts in eights;
    its key is a digest of the seed and the two names.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{key}".encode()).digest()
    skip = start % _STEP
    source = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=start // _STEP)
    # `random_raw` gives the same numbers, but holds the interpreter's lock meanwhile
    drawn = np.random.Generator(source).integers(0, 2**32, stop - start + skip, dtype=np.uint32)
    return drawn[skip:]


def below(probability: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """The bound that 32 random bits are below with this probability, in [0, 1)."""
    bounds = np.floor(np.asarray(probability, np.float64) * 2.0**32)
    return np.clip(bounds, 0, 2.0**32 - 1).astype(np.uint32)
