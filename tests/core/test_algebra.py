from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coldmerge.core.algebra import add, apply, negate, scale
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.core.task_vector import TaskVector

Save = Callable[..., Checkpoint]
DIGEST = "ef" * 32
START = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.linspace(-1, 1, 7),
    "ids": torch.arange(4),
}


def lora_vector(path: Path, scaling: float = 0.5, base_digest: str = DIGEST) -> TaskVector:
    """A task vector with factors for `a` and a full delta for `b`."""
    torch.manual_seed(3)
    save_file(
        {"a.lora_A": torch.randn(2, 4), "a.lora_B": torch.randn(3, 2), "b": torch.randn(7)},
        path,
        {
            "coldmerge.kind": "lora",
            "coldmerge.encoding": "fp32",
            "coldmerge.base_digest": base_digest,
            "coldmerge.scaling": f'{{"a":{scaling}}}',
        },
    )
    return TaskVector.open(path)


@pytest.fixture
def base(save: Save) -> Checkpoint:
    return save("base", START)


@pytest.fixture
def full(base: Checkpoint, save: Save, tmp_path: Path) -> TaskVector:
    moved = {n: x + torch.randn_like(x) if x.is_floating_point() else x for n, x in START.items()}
    tuned = save("tuned", moved)
    return extract(base, tuned.folder, tmp_path / "full", base_digest=DIGEST).task_vector


def dense(vector: TaskVector) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(vector.block(name, 0, START[name].numel())).reshape(
            START[name].shape
        )
        for name in sorted(vector.names)
    }


def test_a_fine_tune_comes_back_whole(base: Checkpoint, full: TaskVector, tmp_path: Path) -> None:
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("card")
    applied = apply(base, [(full, 1.0)], tmp_path / "out")
    for name, delta in dense(full).items():
        expected = (START[name].double() + delta.double()).float()
        np.testing.assert_array_equal(applied.array(name), expected.numpy())
    np.testing.assert_array_equal(applied.array("ids"), START["ids"].numpy())
    assert [path.name for path in applied.files()] == ["config.json", "tokenizer.json"]


def test_several_vectors_are_summed_in_float64_and_rounded_once(
    base: Checkpoint, full: TaskVector, tmp_path: Path
) -> None:
    lora = lora_vector(tmp_path / "lora")
    applied = apply(base, [(full, 0.3), (lora, -1.7)], tmp_path / "out")
    for name in ("a", "b"):
        total = dense(full)[name].double() * 0.3 + dense(lora)[name].double() * -1.7
        expected = (START[name].double() + total).float()
        np.testing.assert_array_equal(applied.array(name), expected.numpy())


def test_lora_stays_lora_when_scaled(tmp_path: Path) -> None:
    lora = lora_vector(tmp_path / "lora")
    scaled = scale(lora, -2.5, tmp_path / "scaled")
    assert (scaled.kind, scaled.scaling) == ("lora", {"a": -1.25})
    before, after = load_file(lora.path), load_file(scaled.path)
    assert torch.equal(before["a.lora_A"], after["a.lora_A"])
    assert torch.equal(before["a.lora_B"], after["a.lora_B"])
    assert torch.equal(before["b"] * -2.5, after["b"])
    torch.testing.assert_close(dense(scaled)["a"], dense(lora)["a"] * -2.5)


def test_negating_twice_gives_the_same_file(full: TaskVector, tmp_path: Path) -> None:
    once = negate(full, tmp_path / "once")
    twice = negate(once, tmp_path / "twice")
    assert twice.path.read_bytes() == full.path.read_bytes()
    for name, delta in dense(once).items():
        assert torch.equal(delta, -dense(full)[name])


def test_a_sum_is_full_and_applies_like_its_parts(
    base: Checkpoint, full: TaskVector, tmp_path: Path
) -> None:
    lora = lora_vector(tmp_path / "lora")
    total = add([(full, 1.0), (lora, 1.0)], tmp_path / "sum")
    assert total.kind == "full"
    for name, delta in dense(total).items():
        parts = dense(full)[name].double() + dense(lora)[name].double()
        assert torch.equal(delta, parts.float())
    nothing = add([(full, 1.0), (negate(full, tmp_path / "n"), 1.0)], tmp_path / "zero")
    assert nothing.norm() == 0


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(ColdmergeError) as caught:
        call()
    return caught.value.code


def test_what_does_not_fit_is_refused(
    base: Checkpoint, full: TaskVector, save: Save, tmp_path: Path
) -> None:
    lora = lora_vector(tmp_path / "lora", base_digest="00" * 32)
    out = tmp_path / "out"
    assert code_of(lambda: add([(full, 1), (lora, 1)], out)) == "task_vector.mixed_bases"
    assert code_of(lambda: add([], out)) == "task_vector.mixed_bases"
    for name, tensors in {
        "shape": {"a": torch.zeros(4, 3), "b": torch.zeros(7)},
        "name": {"a": torch.zeros(3, 4)},
        "dtype": {"a": torch.zeros(3, 4), "b": torch.zeros(7).int()},
    }.items():
        other = save(name, tensors)
        fits = code_of(lambda other=other: apply(other, [(full, 1.0)], out))  # type: ignore[misc]
        assert fits == "task_vector.does_not_fit"
    assert code_of(lambda: full.shape("nothing")) == "task_vector.no_such_tensor"
    assert not out.exists()


def test_a_result_that_is_not_finite_is_refused(
    base: Checkpoint, full: TaskVector, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert code_of(lambda: apply(base, [(full, 1e300)], out)) == "task_vector.not_finite"
    assert code_of(lambda: scale(full, 1e300, out)) == "task_vector.not_finite"
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_shapes_that_differ_between_vectors_are_refused(
    full: TaskVector, save: Save, tmp_path: Path
) -> None:
    base, tuned = save("b2", {"a": torch.zeros(4, 3)}), save("t2", {"a": torch.ones(4, 3)})
    other = extract(base, tuned.folder, tmp_path / "other", base_digest=DIGEST).task_vector
    found = code_of(lambda: add([(full, 1), (other, 1)], tmp_path / "sum"))
    assert found == "task_vector.shapes_differ"
