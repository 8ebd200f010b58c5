from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coldmerge.core.dtypes import FLOATS, NUMPY, as_bytes, blocks, from_float32, nbytes, to_float32
from coldmerge.core.errors import CheckpointError

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_every_short_float_widens_as_in_torch(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    raw = bits if dtype != "F32" else np.repeat(bits, 2)
    ours = to_float32(raw.view(NUMPY[dtype]))
    theirs = torch.from_numpy(raw.view(np.int16)).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@given(arrays(np.float32, st.integers(1, 40), elements=finite))
def test_bf16_rounds_to_nearest_even_as_in_torch(values: np.ndarray) -> None:
    ours = from_float32(values, "BF16").view(np.uint16)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, theirs)


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-65000, 65000, width=32)))
def test_f16_rounds_to_nearest_even_as_in_torch(values: np.ndarray) -> None:
    ours = from_float32(values, "F16").view(np.uint16)
    theirs = torch.from_numpy(values).half().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, theirs)


@given(st.integers(0, 2**16 - 2))
def test_halfway_between_two_bf16_goes_to_the_even_one(low: int) -> None:
    value = np.array([(low << 16) | 0x8000], np.uint32).view(np.float32)
    if not np.isfinite(to_float32(np.array([low + 1], np.uint16).view(ml_dtypes.bfloat16)))[0]:
        return
    (bits,) = from_float32(value, "BF16").view(np.uint16)
    assert bits == (low if low % 2 == 0 else low + 1)


def test_a_value_too_large_for_f16_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        from_float32(np.array([1.0, 1e6], np.float32), "F16")
    assert caught.value.code == "checkpoint.overflow"
    assert caught.value.got == "1e+06"


def test_float32_is_not_copied() -> None:
    values = np.ones(3, np.float32)
    assert to_float32(values) is values
    assert as_bytes(values).nbytes == 12


def test_sizes_and_blocks() -> None:
    assert nbytes("BF16", (3, 5)) == 30
    assert nbytes("F32", ()) == 4
    assert list(blocks(5, 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(blocks(0)) == []
