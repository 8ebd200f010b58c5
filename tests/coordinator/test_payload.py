"""The check that follows a payload, however it is cut into pieces."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.core.dtypes import NUMPY
from coldmerge.core.errors import ColdmergeError, ConflictError
from coldmerge_coordinator.payload import PayloadCheck

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": ()}


def _example(dtype: str) -> tuple[Manifest, bytes, float]:
    generator = np.random.default_rng(1)
    arrays = {
        name: np.asarray(generator.standard_normal(shape)).astype(NUMPY[dtype])
        for name, shape in SHAPES.items()
    }
    entries = tuple(
        TensorEntry(
            name=name,
            dtype=dtype,
            shape=array.shape,
            sha256=hashlib.sha256(array.tobytes()).hexdigest(),
            nbytes=array.nbytes,
        )
        for name, array in arrays.items()
    )
    manifest = Manifest(
        federation="f",
        model="m",
        round="r",
        contributor="c",
        base_digest="0" * 64,
        base_number=0,
        nonce="0" * 32,
        created_at=datetime(2026, 3, 2, tzinfo=UTC),
        kind="full",
        encoding="fp32" if dtype == "F32" else "bf16",
        tensors=entries,
        examples=1,
        norm=1.0,
    )
    squares = sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays.values())
    return manifest, b"".join(array.tobytes() for array in arrays.values()), squares**0.5


EXAMPLES = {dtype: _example(dtype) for dtype in ("F32", "BF16")}
TOTAL = {dtype: len(payload) for dtype, (_, payload, _) in EXAMPLES.items()}


@settings(deadline=None, max_examples=60)
@given(dtype=st.sampled_from(["F32", "BF16"]), cuts=st.lists(st.integers(0, 120), max_size=12))
def test_any_cut_gives_the_same_norm(dtype: str, cuts: list[int]) -> None:
    manifest, payload, norm = EXAMPLES[dtype]
    check, edges = PayloadCheck(manifest), sorted({0, *cuts, len(payload)})
    for start, stop in pairwise(edges):
        check.feed(payload[start:stop])
    check.check_complete()
    assert check.norm == pytest.approx(norm, rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(at=st.integers(0, TOTAL["F32"] - 1), bit=st.integers(0, 7), cut=st.integers(1, 40))
def test_any_flipped_bit_is_found(at: int, bit: int, cut: int) -> None:
    manifest, payload, _ = EXAMPLES["F32"]
    raw = bytearray(payload)
    raw[at] ^= 1 << bit
    check = PayloadCheck(manifest)
    pieces = (bytes(raw[start : start + cut]) for start in range(0, len(raw), cut))
    with pytest.raises(ColdmergeError):
        list(map(check.feed, pieces))


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, TOTAL["BF16"] - 1))
def test_a_short_payload_is_not_complete(length: int) -> None:
    manifest, payload, _ = EXAMPLES["BF16"]
    check = PayloadCheck(manifest)
    check.feed(payload[:length])
    with pytest.raises(ConflictError):
        check.check_complete()


def test_a_long_payload_takes_nothing() -> None:
    manifest, payload, norm = EXAMPLES["F32"]
    check = PayloadCheck(manifest)
    with pytest.raises(ColdmergeError):
        check.feed(payload + b"\0")
    assert check.position == 0
    check.feed(payload)
    assert check.norm == pytest.approx(norm)
