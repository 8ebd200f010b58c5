from __future__ import annotations

import math
import pickle
import random
from functools import partial
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coldmerge.core.dtypes import Floats32, Floats64, from_float32
from coldmerge.core.errors import ColdmergeError, ConfigError
from coldmerge.merging import Block, Cut, Input, Job, Merger, Pool, Scope, Space, View, uniform
from coldmerge.merging.methods.mean import Mean
from tests.merging.sources import ArrayDelta, ArraySource, job, merged

finite = st.floats(-(2.0**60), 2.0**60, width=32)
problems = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, 23, elements=finite),
        arrays(np.float32, (n, 23), elements=finite),
        st.lists(st.floats(0.01, 100), min_size=n, max_size=n),
    )
)


def mean(
    base: dict[str, Floats32], inputs: list[Input], *, block: int = 2**16, threads: int = 1
) -> dict[str, Floats32]:
    """The mean by weight, through `in_order`."""
    source = ArraySource(base)
    weights = [item.weight for item in sorted(inputs, key=lambda item: item.key)]
    shapes = {name: x.shape for name, x in source.tensors.items()}
    work = Job(source, shapes, inputs, uniform(Mean, {}, weights), block)
    with Pool(threads) as pool:
        return {
            name: np.concatenate(list(work.in_order(name, pool, work.theta))) for name in work.names
        }


@given(problems, st.integers(1, 40), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_mean_is_that_of_torch_to_the_last_bit_in_any_order_and_block(
    problem: tuple[Floats32, Floats32, list[float]], block: int, threads: int, rng: random.Random
) -> None:
    base, taus, weights = problem
    inputs = [
        Input(f"{i:064x}", ArrayDelta({"w": tau}), weight)
        for i, (tau, weight) in enumerate(zip(taus, weights, strict=True))
    ]
    rng.shuffle(inputs)
    found = mean({"w": base}, inputs, block=block, threads=threads)["w"]
    total = torch.zeros(23, dtype=torch.float64)
    for tau, weight in zip(taus, weights, strict=True):
        total = total + torch.from_numpy(tau).double() * weight
    expected = (torch.from_numpy(base).double() + total / math.fsum(weights)).float()
    np.testing.assert_array_equal(found, expected.numpy())


def test_a_tensor_that_an_input_does_not_touch_counts_as_zero() -> None:
    base = {"w": np.zeros(3, np.float32), "v": np.ones(3, np.float32)}
    one = Input("1", ArrayDelta({"w": np.full(3, 4)}))
    two = Input("2", ArrayDelta({"v": np.full(3, 2)}), 3.0)
    found = mean(base, [one, two], block=2)
    np.testing.assert_array_equal(found["w"], [1, 1, 1])
    np.testing.assert_array_equal(found["v"], [2.5, 2.5, 2.5])


def test_twenty_tiny_bf16_rounds_do_not_stall_with_a_master() -> None:
    rng = np.random.default_rng(1)
    master = rng.standard_normal(2000).astype(np.float32)
    step = (0.0002 * np.abs(master)).astype(np.float32)
    first = published = from_float32(master, "BF16")
    stalled = published
    for _ in range(20):
        inputs = [Input(str(i), ArrayDelta({"w": step})) for i in range(3)]
        master = mean({"w": master}, inputs, block=512)["w"]
        published = from_float32(master, "BF16")
        stalled = (stalled.astype(np.float32) + step).astype(ml_dtypes.bfloat16)
    moved = np.mean(published.astype(np.float32) != first.astype(np.float32))
    naive = np.mean(stalled.astype(np.float32) != first.astype(np.float32))
    assert naive < 0.2 < 0.6 < moved


@given(arrays(np.float32, 9, elements=finite), st.integers(1, 5), st.floats(0.1, 10))
def test_equal_inputs_give_that_input(tau: Floats32, n: int, weight: float) -> None:
    inputs = [Input(str(i), ArrayDelta({"w": tau}), weight) for i in range(n)]
    found = mean({"w": np.zeros(9, np.float32)}, inputs, block=4)["w"]
    np.testing.assert_allclose(found, tau, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_mean_refuses_weights_that_are_not_positive_and_finite(weight: float) -> None:
    with pytest.raises(ColdmergeError) as caught:
        uniform(Mean, {}, [1.0, weight])
    assert caught.value.code == "merge.bad_parameter"
    assert caught.value.ids["parameter"] == "weight"


def test_no_input_and_one_key_twice_are_refused() -> None:
    tau = ArrayDelta({"w": np.ones(1)})
    with pytest.raises(ColdmergeError) as caught:
        mean({"w": np.ones(1, np.float32)}, [Input("k", tau), Input("k", tau)])
    assert caught.value.code == "merge.duplicate_input"
    with pytest.raises(ColdmergeError) as caught:
        mean({"w": np.ones(1, np.float32)}, [])
    assert caught.value.code == "merge.inputs"


def test_a_sum_beyond_float32_is_refused() -> None:
    huge = {"w": np.full(1, 3e38, np.float32)}
    with pytest.raises(ColdmergeError) as caught:
        mean(huge, [Input("k", ArrayDelta(huge))])
    assert caught.value.code == "task_vector.not_finite"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["mean", "linear", "ties"])
def test_what_is_not_finite_is_refused_with_tensor_and_input(method: str, value: float) -> None:
    good, bad = np.ones((4, 5)), np.ones((4, 5))
    bad[3, 2] = value
    with pytest.raises(ColdmergeError) as caught:
        merged(method, {"w": good}, [{"w": good}, {"w": bad}], keys=["one", "two"])
    assert caught.value.code == "merge.input_not_finite"
    assert caught.value.ids == {"tensor": "w", "input": "two"}


class Seen(Merger):
    """Writes down what it is given, and merges to zero."""

    name: ClassVar[str] = "seen"
    blocks: ClassVar[list[tuple[str, int, int]]] = []

    def merge(self, block: Block, facts: Any) -> Floats64:
        self.blocks.append((block.name, block.start, block.stop))
        return np.zeros(block.size)


class Rows(Seen):
    """The same, by rows."""

    cut: ClassVar[Cut] = Cut.ROWS


class Whole(Seen):
    """The same, whole."""

    cut: ClassVar[Cut] = Cut.WHOLE


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        (Seen, (3, 7), [(0, 10), (10, 20), (20, 21)]),
        (Rows, (3, 7), [(0, 7), (7, 14), (14, 21)]),
        (Rows, (5, 2, 2), [(0, 8), (8, 16), (16, 20)]),
        (Rows, (2, 30), [(0, 30), (30, 60)]),
        (Rows, (25,), [(0, 25)]),
        (Whole, (3, 7), [(0, 21)]),
        (Seen, (0, 7), []),
        (Rows, (0,), []),
        (Whole, (), [(0, 1)]),
    ],
)
def test_a_tensor_is_cut_as_the_merger_asks(
    method: type[Seen], shape: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    tau = ArrayDelta({"w": np.zeros(shape)})
    recipe = uniform(method, {}, [1.0])
    work = Job(ArraySource({"w": np.zeros(shape)}), {"w": shape}, [Input("1", tau)], recipe, 10)
    Seen.blocks.clear()
    with Pool(1) as pool:
        assert sum(len(part) for part in work.in_order("w", pool, work.theta)) == np.prod(shape)
    assert [(start, stop) for _, start, stop in Seen.blocks] == expected


class GlobalNorm(Merger):
    """Divides the mean by the norm of all inputs over all tensors."""

    name: ClassVar[str] = "global_norm"

    @property
    def scope(self) -> Scope:
        return Scope.GLOBAL

    def measure(self, view: View) -> float:
        flat = [np.concatenate([block.row(i) for block in view.blocks()]) for i in view.inputs]
        parts = view.map_blocks(lambda block: float((block.stack().astype(np.float64) ** 2).sum()))
        assert np.isclose(sum(parts), sum(float((x.astype(np.float64) ** 2).sum()) for x in flat))
        return float(np.sqrt(sum(parts)))

    def merge(self, block: Block, facts: float) -> Floats64:
        return np.asarray(block.stack().astype(np.float64).mean(axis=0) / facts)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_global_measure_sees_every_tensor_end_to_end(threads: int) -> None:
    rng = np.random.default_rng(0)
    taus = [{"a": rng.standard_normal((4, 9)), "b": rng.standard_normal(17)} for _ in range(3)]
    base = {"a": np.zeros((4, 9)), "b": np.zeros(17)}
    inputs = [Input(str(i), ArrayDelta(tau)) for i, tau in enumerate(taus)]
    recipe = uniform(GlobalNorm, {}, [1.0] * 3)
    work = Job(ArraySource(base), {n: np.shape(x) for n, x in base.items()}, inputs, recipe, 8)
    with Pool(threads) as pool:
        work.survey(pool)
        found = np.concatenate(list(work.in_order("a", pool, work.theta)))
    norm = np.sqrt(sum(np.sum(np.float32(x) ** 2) for tau in taus for x in tau.values()))
    expected = np.mean([tau["a"] for tau in taus], axis=0).reshape(-1) / norm
    np.testing.assert_allclose(found, expected, rtol=1e-6)


class Theta(Merger):
    """The first input as it is."""

    name: ClassVar[str] = "theta"
    space: ClassVar[Space] = Space.WEIGHTS

    def merge(self, block: Block, facts: Any) -> Floats32:
        return block.row(0)


def test_a_merger_of_weights_can_be_applied_onto_another_master() -> None:
    base, master = np.array([1, 2], np.float32), np.array([10, 20], np.float32)
    recipe = uniform(Theta, {}, [1.0])
    inputs = [Input("1", ArrayDelta({"w": [0.5, 0.25]}))]
    work = Job(ArraySource({"w": base}), {"w": (2,)}, inputs, recipe)
    with Pool(1) as pool:
        assert list(next(work.in_order("w", pool, work.theta))) == [1.5, 2.25]
        onto = ArraySource({"w": master})
        moved = work.in_order("w", pool, partial(work.theta, onto=onto))
        assert list(next(moved)) == [10.5, 20.25]


def test_matrices_wait_for_room_and_all_get_their_turn() -> None:
    shapes = {f"w{i}": (8, 8 * (i + 1)) for i in range(6)}
    base = {name: np.zeros(shape) for name, shape in shapes.items()}
    recipe = uniform(Whole, {}, [1.0])
    work = Job(ArraySource(base), shapes, [Input("1", ArrayDelta(base))], recipe)
    Seen.blocks.clear()
    with Pool(4) as pool:
        pool.spread(lambda name: work.tensor(name, pool, lambda _at, _values: None), work.names)
    assert sorted(name for name, _, _ in Seen.blocks) == sorted(shapes)


def test_a_job_can_be_sent_to_another_process() -> None:
    work = job("ties", {"w": np.zeros(50)}, [{"w": np.arange(50.0)}], each=[{"density": 0.5}])
    again = pickle.loads(pickle.dumps(work))  # noqa: S301 - our own bytes
    with Pool(1) as pool:
        one, two = (np.concatenate(list(w.in_order("w", pool, w.theta))) for w in (work, again))
    np.testing.assert_array_equal(one, two)
    assert np.count_nonzero(one) == 25


def test_a_weight_among_the_parameters_must_be_a_number() -> None:
    with pytest.raises(ConfigError) as caught:
        uniform(Mean, {"weight": "heavy"}, [1.0])
    assert caught.value.code == "merge.bad_parameter"
    assert [one.weight for one in uniform(Mean, {"weight": 2}, [1.0, 3.0]).each] == [2.0, 6.0]


class One(Merger):
    """One value, where each element has its own."""

    name: ClassVar[str] = "one"

    def merge(self, block: Block, facts: Any) -> Floats32:
        return np.ones(1, np.float32)


def test_a_method_that_gives_another_shape_is_refused() -> None:
    inputs = [Input("1", ArrayDelta({"w": [0.5, 0.25]}))]
    work = Job(ArraySource({"w": np.zeros(2)}), {"w": (2,)}, inputs, uniform(One, {}, [1.0]))
    with Pool(1) as pool, pytest.raises(ConfigError) as caught:
        list(work.in_order("w", pool, work.theta))
    assert (caught.value.code, caught.value.got) == ("merge.wrong_shape", "(1,)")
