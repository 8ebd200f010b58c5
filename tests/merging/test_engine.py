from __future__ import annotations

import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.dtypes import Floats32, from_float32
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.merging import MERGERS, Input, merge, merge_tensor, merged_blocks, merger

DIGEST = "12" * 32
MEAN = MERGERS["mean"]
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


class Memory:
    """Tensors in memory, as a master and as deltas."""

    def __init__(self, **tensors: Floats32) -> None:
        self.tensors = tensors
        self.base_digest = DIGEST

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def block(self, name: str, start: int, stop: int) -> Floats32:
        return self.tensors[name].reshape(-1)[start:stop]


@pytest.fixture(autouse=True)
def _torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(11)


def folder(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    return Checkpoint.open(path)


def whole(name: str, size: int, master: Memory, inputs: list[Input], block: int) -> Floats32:
    return np.concatenate(list(merge_tensor(name, size, master, inputs, MEAN, block)))


finite = st.floats(-(2.0**60), 2.0**60, width=32)
problems = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, 23, elements=finite),
        arrays(np.float32, (n, 23), elements=finite),
        st.lists(st.floats(0.01, 100), min_size=n, max_size=n),
    )
)


@given(problems, st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_mean_is_that_of_torch_to_the_last_bit_in_any_order_and_block(
    problem: tuple[Floats32, Floats32, list[float]], block: int, rng: random.Random
) -> None:
    base, taus, weights = problem
    inputs = [
        Input(f"{i:064x}", Memory(w=tau), weight)
        for i, (tau, weight) in enumerate(zip(taus, weights, strict=True))
    ]
    rng.shuffle(inputs)
    merged = whole("w", 23, Memory(w=base), inputs, block)
    total = torch.zeros(23, dtype=torch.float64)
    for tau, weight in zip(taus, weights, strict=True):
        total = total + torch.from_numpy(tau).double() * weight
    expected = (torch.from_numpy(base).double() + total / sum(weights)).float()
    np.testing.assert_array_equal(merged, expected.numpy())


def test_a_tensor_that_an_input_does_not_touch_counts_as_zero() -> None:
    base = Memory(w=np.zeros(3, np.float32), v=np.ones(3, np.float32))
    one = Input("1", Memory(w=np.full(3, 4, np.float32)))
    two = Input("2", Memory(v=np.full(3, 2, np.float32)), 3.0)
    np.testing.assert_array_equal(whole("w", 3, base, [one, two], 2), [1, 1, 1])
    np.testing.assert_array_equal(whole("v", 3, base, [one, two], 2), [2.5, 2.5, 2.5])


def test_blocks_come_in_order_and_cover_the_tensor() -> None:
    tau = Input("1", Memory(w=np.arange(10, dtype=np.float32)))
    found = list(merged_blocks("w", 10, [tau], MEAN, block=4))
    assert [(start, stop) for start, stop, _ in found] == [(0, 4), (4, 8), (8, 10)]
    assert all(block.dtype == np.float64 for _, _, block in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_the_base_plus_the_mean_in_the_types_of_the_base(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    start = {
        "body.w": torch.randn(40, 30).to(dtype),
        "body.b": torch.randn(30).to(dtype),
        "frozen.w": torch.randn(8).to(dtype),
        "ids": torch.arange(5),
    }
    base = folder(tmp_path / "base", start)
    inputs, taus = [], []
    for i in range(4):
        end = {
            n: x.float() + 0.1 * torch.randn_like(x.float()) if "body" in n else x
            for n, x in start.items()
        }
        tuned = folder(tmp_path / f"tuned{i}", end)
        out = tmp_path / f"v{i}"
        vector = extract(base, tuned.folder, out, base_digest=DIGEST).task_vector
        inputs.append(Input(f"{9 - i}", vector))
        taus.append(load_file(out))
    merged = merge(base, inputs, MEAN, tmp_path / "merged")
    for name, tensor in start.items():
        expected = tensor
        if "body" in name:
            total = torch.zeros(tensor.shape, dtype=torch.float64)
            for tau in reversed(taus):
                total = total + tau[name].double()
            expected = (tensor.double() + total / 4).float().to(dtype)
        assert torch.equal(load_file(merged.folder / "model.safetensors")[name], expected)
    again = merge(base, inputs[::-1], MEAN, tmp_path / "again")
    files = ("model.safetensors", "config.json")
    for file in files:
        assert (again.folder / file).read_bytes() == (merged.folder / file).read_bytes()


def test_twenty_tiny_bf16_rounds_do_not_stall_with_a_master() -> None:
    rng = np.random.default_rng(1)
    master = rng.standard_normal(2000).astype(np.float32)
    step = (0.0002 * np.abs(master)).astype(np.float32)
    first = published = from_float32(master, "BF16")
    stalled = published
    for _ in range(20):
        inputs = [Input(str(i), Memory(w=step)) for i in range(3)]
        master = whole("w", 2000, Memory(w=master), inputs, 512)
        published = from_float32(master, "BF16")
        stalled = (stalled.astype(np.float32) + step).astype(ml_dtypes.bfloat16)
    moved = np.mean(published.astype(np.float32) != first.astype(np.float32))
    naive = np.mean(stalled.astype(np.float32) != first.astype(np.float32))
    assert naive < 0.2 < 0.6 < moved


@given(arrays(np.float32, 9, elements=finite), st.integers(1, 5), st.floats(0.1, 10))
def test_equal_inputs_give_that_input(tau: Floats32, n: int, weight: float) -> None:
    inputs = [Input(str(i), Memory(w=tau), weight) for i in range(n)]
    merged = whole("w", 9, Memory(w=np.zeros(9, np.float32)), inputs, 4)
    np.testing.assert_allclose(merged, tau, rtol=1e-6)


@pytest.mark.parametrize(
    ("code", "weights"),
    [
        ("merge.bad_weights", {}),
        ("merge.bad_weights", {"a": 0.0}),
        ("merge.bad_weights", {"a": 1.0, "b": -1.0}),
        ("merge.bad_weights", {"a": float("nan")}),
        ("merge.bad_weights", {"a": float("inf")}),
        ("merge.bad_weights", {"a": 1.7e308, "b": 1.7e308}),
    ],
)
def test_bad_weights_are_refused(code: str, weights: dict[str, float]) -> None:
    tau = Memory(w=np.ones(1, np.float32))
    inputs = [Input(key, tau, weight) for key, weight in weights.items()]
    with pytest.raises(ColdmergeError) as caught:
        whole("w", 1, tau, inputs, 1)
    assert caught.value.code == code


def test_one_key_twice_is_refused() -> None:
    tau = Memory(w=np.ones(1, np.float32))
    with pytest.raises(ColdmergeError) as caught:
        whole("w", 1, tau, [Input("k", tau), Input("k", tau)], 1)
    assert caught.value.code == "merge.duplicate_input"


def test_a_sum_beyond_float32_is_refused() -> None:
    huge = Memory(w=np.full(1, 3e38, np.float32))
    with pytest.raises(ColdmergeError) as caught:
        whole("w", 1, huge, [Input("k", huge)], 1)
    assert caught.value.code == "task_vector.not_finite"


def test_an_unknown_method_lists_the_known_ones() -> None:
    assert merger("mean") is MEAN
    with pytest.raises(ColdmergeError) as caught:
        merger("average")
    assert caught.value.code == "merge.unknown_method"
    assert caught.value.expected == "mean"


@pytest.mark.parametrize("change", ["digest", "shape", "name"])
def test_a_folder_refuses_inputs_that_do_not_fit(tmp_path: Path, change: str) -> None:
    base = folder(tmp_path / "base", {"w": torch.zeros(4)})
    other: Memory = {
        "digest": Memory(w=np.ones(4, np.float32)),
        "shape": Memory(w=np.ones(5, np.float32)),
        "name": Memory(x=np.ones(4, np.float32)),
    }[change]
    if change == "digest":
        other.base_digest = "00" * 32
    inputs = [Input("1", Memory(w=np.ones(4, np.float32))), Input("2", other)]
    with pytest.raises(ColdmergeError) as caught:
        merge(base, inputs, MEAN, tmp_path / "out")
    expected = "task_vector.mixed_bases" if change == "digest" else "task_vector.does_not_fit"
    assert caught.value.code == expected
    assert not (tmp_path / "out").exists()


def test_each_method_is_registered_under_its_name() -> None:
    assert all(found.name == name for name, found in MERGERS.items())
