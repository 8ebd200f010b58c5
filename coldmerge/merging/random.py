"""Random numbers of a merge: drawn by place, so they depend on no block, thread or machine."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]


def bits(seed: int, name: str, key: str, start: int, stop: int) -> Bits:
    """Uniform 32-bit numbers for elements [start, stop) of tensor `name` of input `key`.

    Element by element the same for every range that holds it: PCG64 DXSM jumps ahead to any
    place. Its seed is a digest of `seed` and the two names. A draw gives two elements.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{key}".encode()).digest()
    source = np.random.PCG64DXSM(int.from_bytes(digest[:16], "little")).advance(start // 2)
    draws = -(-stop // 2) - start // 2
    # `random_raw` would give the same numbers, but hold the interpreter's lock meanwhile
    pairs = np.random.Generator(source).integers(0, 2**64, draws, dtype=np.uint64)
    return pairs.astype("<u8", copy=False).view("<u4")[start % 2 : start % 2 + stop - start]


def below(probability: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """The bound that 32 random bits are below with this probability, in [0, 1)."""
    bounds = np.floor(np.asarray(probability, np.float64) * 2.0**32)
    return np.clip(bounds, 0, 2.0**32 - 1).astype(np.uint32)
