"""Cosines and hints, from inner products; duplicates, from manifests."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.screening.duplicates import LARGE, shared_tensor
from coldmerge.screening.policy import ScreeningPolicy
from coldmerge.screening.report import Inner, Screened, cosines, report

DIM = 4000


def look(*vectors: npt.NDArray[np.float64]) -> dict[str, object]:
    rows = np.array([*vectors, np.mean(vectors, axis=0)])
    names = tuple(f"{at:064x}" for at in range(len(vectors)))
    inputs = [
        Screened(name, f"org-{at}", float(np.linalg.norm(vectors[at])), 1.0)
        for at, name in enumerate(names)
    ]
    found = report(inputs, Inner(names, rows @ rows.T, 1), ScreeningPolicy())
    return dict(json.loads(json.dumps(found)))


def draws(count: int) -> list[npt.NDArray[np.float64]]:
    return list(np.random.default_rng(3).standard_normal((count, DIM)))


def kinds(found: dict[str, object]) -> list[tuple[str, list[str]]]:
    hints = found["hints"]
    assert isinstance(hints, list)
    return [(hint["kind"], hint["contributors"]) for hint in hints]


def test_honest_vectors_give_no_hint() -> None:
    vectors = draws(4)
    found = look(*vectors)
    assert kinds(found) == []
    matrix = np.array(found["cosines"])
    np.testing.assert_allclose(matrix, np.corrcoef(vectors), atol=0.02)
    mean = np.mean(vectors, axis=0)
    expected = vectors[0] @ mean / np.linalg.norm(vectors[0]) / np.linalg.norm(mean)
    inputs = found["inputs"]
    assert isinstance(inputs, list)
    assert inputs[0]["cosine_to_merged"] == round(float(expected), 6)
    merged = found["merged_norm"]
    assert isinstance(merged, float)
    assert abs(merged - float(np.linalg.norm(mean))) < 1e-9


def test_copies_scaled_copies_and_near_copies_are_told_apart() -> None:
    a, b, c = draws(3)
    assert kinds(look(a, b, a)) == [("copies", ["org-0", "org-2"])]
    assert kinds(look(a, b, 3 * a)) == [("scaled_copies", ["org-0", "org-2"])]
    near = [a, a + 0.05 * b, a + 0.05 * c, c]
    assert kinds(look(*near)) == [("near_copies", ["org-0", "org-1", "org-2"])]


def test_a_flipped_sign_is_pointed_at() -> None:
    common = draws(1)[0]
    vectors = [common + 0.5 * own for own in draws(4)[1:]]
    assert kinds(look(*vectors, -5 * common)) == [("against_the_others", ["org-3"])]


def test_zero_vectors_and_single_ones_are_no_trouble() -> None:
    a = draws(1)[0]
    assert kinds(look(a)) == []
    assert kinds(look(a, np.zeros(DIM))) == []
    np.testing.assert_array_equal(cosines(np.zeros((2, 2))), 0)


def test_many_inputs_are_listed_without_cosines() -> None:
    found = report([Screened("0" * 64, "a", 1.0, 0.5)], None, ScreeningPolicy())
    assert found["inputs"][0]["factor"] == 0.5
    assert found["sampled"] is None


def manifest(contributor: str, **tensors: bytes) -> Manifest:
    entries = tuple(
        TensorEntry(
            name=name.replace("__", "."),
            dtype="F32",
            shape=(len(data) // 4,),
            sha256=hashlib.sha256(data).hexdigest(),
            nbytes=len(data),
        )
        for name, data in sorted(tensors.items())
    )
    return Manifest(
        federation="f",
        model="m",
        round="r",
        contributor=contributor,
        base_digest="0" * 64,
        base_number=0,
        nonce="0" * 32,
        created_at=datetime.now(UTC),
        kind="full",
        encoding="fp32",
        tensors=entries,
        statistics={"fisher": 1.0},
        examples=1,
        norm=1.0,
    )


def test_a_large_tensor_in_common_is_a_duplicate() -> None:
    one, two = b"\1" * LARGE, b"\2" * LARGE
    mine = manifest("a", x=one, y=two)
    assert shared_tensor(mine, [manifest("b", z=two)]) == ("y", "b")
    assert shared_tensor(mine, [manifest("b", x=b"\3" * LARGE)]) is None
    assert shared_tensor(mine, [mine]) is None, "its own, sent again"
    assert shared_tensor(mine, []) is None


def test_what_honest_contributors_have_in_common_is_none() -> None:
    small, zeros, same = b"\1" * (LARGE - 4), bytes(LARGE), b"\1" * LARGE
    for name, data in (("x", small), ("x", zeros), ("x__lora_A", same), ("x__fisher", same)):
        pair = [manifest(org, **{name: data}) for org in "ab"]
        assert shared_tensor(pair[0], pair[1:]) is None, name
    pair = [manifest(org, x__lora_B=same) for org in "ab"]
    assert shared_tensor(pair[0], pair[1:]) == ("x.lora_B", "b")
