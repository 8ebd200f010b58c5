from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import content_entries
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.core.matching import match_folder
from coldmerge.merging import Input, Tuned, merge, merger
from tests.merging.sources import DIGEST, ArrayDelta

MEAN = merger("mean")


@pytest.fixture(autouse=True)
def _torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(11)


def folder(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    return Checkpoint.open(path)


def tuned_inputs(tmp_path: Path, base: Checkpoint, n: int) -> list[Input]:
    """Fine-tunes of all float tensors, read as folders."""
    inputs = []
    start = load_file(base.folder / "model.safetensors")
    for i in range(n):
        end = {
            name: x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x
            for name, x in start.items()
        }
        model = folder(tmp_path / f"tuned{i}", end)
        pairs = match_folder(base, model, ()).pairs
        inputs.append(Input(f"{i}", Tuned(base, model, pairs, DIGEST), label=f"tuned{i}"))
    return inputs


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
    content = merge(base, inputs, MEAN, tmp_path / "merged")
    for name, tensor in start.items():
        expected = tensor
        if "body" in name:
            total = torch.zeros(tensor.shape, dtype=torch.float64)
            for tau in reversed(taus):
                total = total + tau[name].double()
            expected = (tensor.double() + total / 4).float().to(dtype)
        found = load_file(tmp_path / "merged" / "model.safetensors")[name]
        assert torch.equal(found, expected)
    again = merge(base, inputs[::-1], MEAN, tmp_path / "again")
    assert again == content == content_entries(Checkpoint.open(tmp_path / "merged"))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


@pytest.mark.parametrize("method", ["linear", "ties", "mean"])
def test_the_bytes_do_not_depend_on_threads_or_shards(tmp_path: Path, method: str) -> None:
    shapes = {"a": (700, 300), "b": (300,), "c": (65_537,), "d": (2, 3, 4), "e": (0, 4)}
    base = folder(tmp_path / "base", {name: torch.randn(shape) for name, shape in shapes.items()})
    inputs = tuned_inputs(tmp_path, base, 3)
    recipe = merger(method)
    one = merge(base, inputs, recipe, tmp_path / "one", threads=1)
    for threads in (2, 5):
        other = merge(base, inputs, recipe, tmp_path / f"{threads}", threads=threads)
        assert other.digest == one.digest
    shards = merge(base, inputs, recipe, tmp_path / "shards", max_shard_bytes=500_000)
    assert shards.digest == one.digest
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert content_entries(Checkpoint.open(tmp_path / "shards")).digest == one.digest


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_another_type_is_written_for_every_float_tensor(
    tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    start = {"w": torch.randn(30, 20), "frozen": torch.randn(9), "ids": torch.arange(4)}
    base = folder(tmp_path / "base", start)
    delta = ArrayDelta({"w": np.full((30, 20), 0.5)})
    merge(base, [Input("1", delta)], MEAN, tmp_path / "out", dtype=dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["w"], (start["w"] + 0.5).to(kind))
    assert torch.equal(found["frozen"], start["frozen"].to(kind))
    assert torch.equal(found["ids"], start["ids"])


def test_progress_counts_every_byte_and_may_end_the_merge(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {"w": torch.randn(300, 1000), "x": torch.arange(10)})
    inputs = tuned_inputs(tmp_path, base, 2)
    seen: list[tuple[int, int]] = []

    def watch(step: str, done: int, total: int) -> None:
        seen.append((done, total))

    merge(base, inputs, MEAN, tmp_path / "out", progress=watch)
    assert seen[-1] == (1_200_080, 1_200_080)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, inputs, MEAN, tmp_path / "ended", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned0", "tuned1"]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {"w": torch.zeros(4)})
    with pytest.raises(ColdmergeError) as caught:
        merge(base, [Input("1", ArrayDelta({"w": np.ones(4)}))], MEAN, tmp_path / "base")
    assert caught.value.code == "checkpoint.folder_exists"
    assert torch.equal(load_file(tmp_path / "base" / "model.safetensors")["w"], torch.zeros(4))


@pytest.mark.parametrize("change", ["digest", "shape", "name"])
def test_a_folder_refuses_inputs_that_do_not_fit(tmp_path: Path, change: str) -> None:
    base = folder(tmp_path / "base", {"w": torch.zeros(4)})
    other = ArrayDelta({"digest": {"w": np.ones(4)}, "shape": {"w": np.ones(5)}}.get(change, {}))
    if change == "name":
        other = ArrayDelta({"x": np.ones(4)})
    if change == "digest":
        other.base_digest = "00" * 32
    inputs = [Input("1", ArrayDelta({"w": np.ones(4)})), Input("2", other)]
    with pytest.raises(ColdmergeError) as caught:
        merge(base, inputs, MEAN, tmp_path / "out")
    expected = "task_vector.mixed_bases" if change == "digest" else "task_vector.does_not_fit"
    assert caught.value.code == expected
    assert not (tmp_path / "out").exists()
