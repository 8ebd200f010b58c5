"""Fisher merging against its formula in float64, to 1e-6 of the largest weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import Statistic
from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.core.statistics import Measured, Wanted
from coldmerge.merging import Input, Pool, merge, merger
from coldmerge.merging.shipped import check_shipped
from tests.merging.sources import DIGEST, ArrayDelta, Tensors, job, merged
from tests.support import write_model

quick = settings(max_examples=40, deadline=None)
cases = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(0, 999))
Case = tuple[int, int, int]
EXTENTS = {"m.weight": (4, 6), "n.weight": (6,)}


def draw(case: Case) -> tuple[Floats32, Floats32, Floats32, list[float]]:
    """A base (n,), deltas (N, n), diagonals (N, n) from 1e-12 to 1, some zero, and weights."""
    n, count, seed = case
    rng = np.random.default_rng(seed)
    fishers = 10.0 ** rng.uniform(-12, 0, (count, n)) * (rng.random((count, n)) > 0.2)
    base, taus = rng.standard_normal(n), rng.standard_normal((count, n))
    as32 = [x.astype(np.float32) for x in (base, taus, fishers)]
    return as32[0], as32[1], as32[2], list(rng.uniform(0.2, 2, count))


def inputs(taus: Floats32, fishers: Floats32) -> list[ArrayDelta]:
    return [
        ArrayDelta({"w": tau}, {"fisher": {"w": fisher}})
        for tau, fisher in zip(taus, fishers, strict=True)
    ]


def reference(
    base: Floats32, taus: Floats32, fishers: Floats64, weights: list[float], floor: float
) -> Floats64:
    shares = np.maximum(fishers.astype(np.float64), floor) * np.array(weights)[:, None]
    thetas = base.astype(np.float64) + taus.astype(np.float64)
    average: Floats64 = (shares * thetas).sum(0) / shares.sum(0)
    return average


def run(base: Floats32, sources: list[ArrayDelta], weights: list[float], **more: Any) -> Floats32:
    each = [{"weight": weight} for weight in weights]
    parameters = {k: v for k, v in more.items() if k in ("floor", "normalize")}
    rest = {k: v for k, v in more.items() if k not in parameters}
    return merged("fisher", {"w": base}, sources, parameters, each, **rest)["w"]


@quick
@given(cases, st.sampled_from([1e-8, 1e-3]), st.integers(1, 9))
def test_it_is_the_formula_in_float64(case: Case, floor: float, block: int) -> None:
    base, taus, fishers, weights = draw(case)
    found = run(base, inputs(taus, fishers), weights, floor=floor, block=block)
    expected = reference(base, taus, fishers.astype(np.float64), weights, floor)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(
        found, run(base, inputs(taus, fishers), weights, floor=floor, threads=2)
    )


@quick
@given(cases)
def test_normalized_diagonals_count_alike_whatever_their_scale(case: Case) -> None:
    base, taus, fishers, weights = draw(case)
    wide = fishers.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    expected = reference(base, taus, wide / np.where(norms > 0, norms, 1), weights, 1e-8)
    scales = np.float32(2.0) ** np.arange(len(taus), dtype=np.float32)[:, None]
    for shipped in (fishers, fishers * scales):
        found = run(base, inputs(taus, shipped), weights, normalize=True, block=7)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_the_order_of_the_inputs_does_not_matter() -> None:
    base, taus, fishers, weights = draw((30, 4, 1))
    one = run(base, inputs(taus, fishers), weights)
    other = run(base, inputs(taus[::-1], fishers[::-1]), weights[::-1])
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_where_nobody_cares_it_is_the_mean() -> None:
    base, taus, _, weights = draw((30, 3, 2))
    found = run(base, inputs(taus, np.zeros_like(taus)), weights)
    mean = merged("mean", {"w": base}, inputs(taus, taus), {}, [{"weight": w} for w in weights])
    np.testing.assert_allclose(found, mean["w"], rtol=1e-6, atol=1e-7)


def test_a_tensor_without_statistics_gets_the_mean() -> None:
    base, taus, _, weights = draw((30, 3, 3))
    each = [{"weight": w} for w in weights]
    known = {"fisher": {"v": [1.0]}}
    inputs = [ArrayDelta({"w": tau, "v": [1.0]}, known) for tau in taus]
    bases: Tensors = {"w": base, "v": np.zeros(1)}
    found = merged("fisher", bases, inputs, {}, each)["w"]
    mean = merged("mean", {"w": base}, [{"w": t} for t in taus], {}, each)
    np.testing.assert_array_equal(found, mean["w"])


def test_an_input_has_a_say_where_it_changes_a_tensor_or_ships_its_diagonal() -> None:
    one = ArrayDelta({"w": [4.0]}, {"fisher": {"w": [1.0]}})
    silent = ArrayDelta({"v": [1.0]}, {"fisher": {"v": [1.0]}})
    holds = ArrayDelta({"v": [1.0]}, {"fisher": {"v": [1.0], "w": [3.0]}})
    base = {"w": np.zeros(1), "v": np.zeros(1)}
    assert merged("fisher", base, [one, silent])["w"] == 4
    assert merged("fisher", base, [one, holds])["w"] == 1


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_where_an_input_lacks_the_statistic_the_tensor_gets_the_mean(method: str) -> None:
    """One contributor of a round cannot stop the others so; a plan is refused beforehand."""
    kind = "fisher" if method == "fisher" else "gram"
    first = ArrayDelta({"w": np.eye(2)}, {kind: {"w": np.eye(2)}})
    work = job(method, {"w": np.eye(2)}, [first, ArrayDelta({"w": 3 * np.eye(2)})])
    with Pool(1) as pool:
        work.survey(pool)
        found = np.concatenate(list(work.in_order("w", pool, work.theta)))
    np.testing.assert_array_equal(found.reshape(2, 2), 3 * np.eye(2))
    with pytest.raises(ColdmergeError) as caught:
        work.check_statistics()
    assert caught.value.code == "merge.statistic_missing"
    assert caught.value.ids["input"] == "001"
    assert "w" in caught.value.message


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_a_statistic_that_is_not_finite_names_tensor_and_input(method: str) -> None:
    kind = "fisher" if method == "fisher" else "gram"
    bad = ArrayDelta({"w": np.eye(2)}, {kind: {"w": np.full((2, 2), np.nan)}})
    with pytest.raises(ColdmergeError) as caught:
        merged(method, {"w": np.eye(2)}, [bad])
    assert caught.value.code == "merge.statistic_not_finite"
    assert caught.value.ids["tensor"] == "w"
    assert "000" in caught.value.message


def test_the_check_before_a_merge_names_three_tensors_and_the_input() -> None:
    names = [f"t{i}" for i in range(5)]
    deltas = {name: np.ones(2) for name in names}
    whole = ArrayDelta(deltas, {"fisher": deltas})
    part = ArrayDelta(deltas, {"fisher": {name: np.ones(2) for name in names[:1]}})
    check_shipped(job("fisher", deltas, [whole, whole]).inputs, names, "fisher")
    check_shipped(job("fisher", deltas, [part, part]).inputs, names, "fisher")
    for bad, words in ((part, "t1, t2, t3 and 1 more"), (ArrayDelta(deltas), "t0, t1, t2 and 2")):
        with pytest.raises(ColdmergeError) as caught:
            check_shipped(job("fisher", deltas, [whole, bad]).inputs, names, "fisher")
        assert caught.value.code == "merge.statistic_missing"
        assert caught.value.ids["input"] == "001"
        assert words in caught.value.message
    with pytest.raises(ColdmergeError, match="statistic_missing"):
        check_shipped(job("fisher", deltas, [ArrayDelta(deltas)]).inputs, names, "fisher")


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_statistics_come_from_the_files_of_task_vectors(tmp_path: Path, method: str) -> None:
    """Measured beside a fine-tune, extracted, merged into a folder: the same as in memory."""
    kind: Statistic = "fisher" if method == "fisher" else "gram"
    rng = np.random.default_rng(11)
    start = {n: rng.standard_normal(e).astype(np.float32) for n, e in EXTENTS.items()}
    base = Checkpoint.open(write_model(tmp_path / "base", start))
    files, arrays = [], []
    for i in range(3):
        tuned = {n: (x + rng.standard_normal(x.shape)).astype(np.float32) for n, x in start.items()}
        facts = {"m.weight": rng.uniform(0.1, 1, (4, 6)), "n.weight": rng.uniform(0.1, 1, 6)}
        if kind == "gram":
            x = rng.standard_normal((20, 6))
            facts = {"m.weight": x.T @ x}
        facts = {name: values.astype(np.float32) for name, values in facts.items()}
        shipped = write_model(tmp_path / f"facts{i}", {f"{n}.{kind}": x for n, x in facts.items()})
        (shipped / "statistics.json").write_text(json.dumps({kind: 20}))
        vector = extract(
            base,
            write_model(tmp_path / f"tuned{i}", tuned),
            tmp_path / f"v{i}",
            base_digest=DIGEST,
            statistics=Wanted(measured=Measured.open(shipped, {kind})),
        ).task_vector
        files.append(Input(f"{i:03}", vector))
        arrays.append(ArrayDelta({n: tuned[n] - x for n, x in start.items()}, {kind: facts}))
    merge(base, files, merger(method), tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    for name, values in merged(method, start, arrays).items():
        np.testing.assert_array_equal(found.array(name), values)
