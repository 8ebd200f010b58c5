"""Element types: safetensors names, numpy types, and the roads to and from float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

from coldmerge.core.errors import CheckpointError

NUMPY: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Every type we read, by its safetensors name. Types below one byte are not among them."""

FLOATS = frozenset({"F32", "F16", "BF16"})
"""The types that merge. Any other is a buffer: kept as it is, never in a task vector."""

ENCODINGS: dict[str, str] = {"fp32": "F32", "bf16": "BF16"}
"""Encodings of a task vector and the type their tensors are stored in."""

BLOCK = 2**18
"""Elements that are in memory at a time, per tensor read: 1 MiB of float32."""

Floats32 = npt.NDArray[np.float32]
Floats64 = npt.NDArray[np.float64]


def size(shape: Sequence[int]) -> int:
    """Number of elements of `shape`."""
    return math.prod(shape)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Number of bytes of a tensor of type `dtype` (a safetensors name)."""
    return NUMPY[dtype].itemsize * size(shape)


def to_float32(array: npt.NDArray[np.generic]) -> Floats32:
    """The values of an F32, F16 or BF16 array as float32 (exact; F32 is not copied)."""
    if array.dtype == NUMPY["BF16"]:
        wide = array.view(np.uint16).astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(array: Floats32, dtype: str) -> npt.NDArray[np.generic]:
    """`array` in an F32, F16 or BF16 type, rounded to nearest, ties to even.

    Raises:
        CheckpointError: a finite value is beyond the largest that `dtype` holds.
    """
    try:
        with np.errstate(over="raise", under="ignore"):
            return array.astype(NUMPY[dtype], copy=False)
    except FloatingPointError as error:
        raise CheckpointError(
            "checkpoint.overflow",
            f"A value does not fit the type {dtype}.",
            expected=f"at most {float(ml_dtypes.finfo(NUMPY[dtype]).max):g}",
            got=f"{float(np.abs(array).max()):g}",
            hint="Add the model in F32 or BF16: their range is 1e34 times wider than F16's.",
        ) from error


def as_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """The little-endian bytes of a contiguous array, not copied."""
    return array.reshape(-1).view(np.uint8).data


def blocks(count: int, step: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `step` elements that cover `count`."""
    for start in range(0, count, step):
        yield start, min(start + step, count)
