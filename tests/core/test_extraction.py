from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import save_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import Extraction, extract
from coldmerge.core.task_vector import TaskVector, vector_header

Save = Callable[..., Checkpoint]
DIGEST = "ab" * 32


def run(base: Checkpoint, tuned: Path, **options: Any) -> Extraction:
    return extract(base, tuned, tuned.parent / "v.safetensors", base_digest=DIGEST, **options)


def failure(base: Checkpoint, tuned: Path, **options: Any) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        run(base, tuned, **options)
    assert not list(tuned.parent.glob("v.safetensors*"))
    return caught.value


@pytest.mark.parametrize("base_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuned_type", [torch.float32, torch.bfloat16, torch.float16])
def test_the_delta_is_that_of_torch(
    save: Save, base_type: torch.dtype, tuned_type: torch.dtype
) -> None:
    start = {"b.w": torch.randn(20, 7).to(base_type), "a.w": torch.randn(9).to(base_type)}
    end = {
        name: (x.float() + torch.randn_like(x.float()) * 0.1).to(tuned_type)
        for name, x in start.items()
    }
    base, tuned = save("base", start), save("tuned", end)
    found = run(base, tuned.folder)
    vector = found.task_vector
    assert (vector.kind, vector.encoding, vector.base_digest) == ("full", "fp32", DIGEST)
    assert vector.names == {"a.w", "b.w"}
    total = 0.0
    with safe_open(vector.path, "pt") as file:
        assert list(file.keys()) == ["a.w", "b.w"]
        for name in start:
            delta = end[name].float() - start[name].float()
            assert torch.equal(file.get_tensor(name), delta)
            np.testing.assert_array_equal(
                vector.block(name, 0, delta.numel()), delta.reshape(-1).numpy()
            )
            total += float(delta.double().square().sum())
    assert math.isclose(found.norm, math.sqrt(total), rel_tol=1e-12)
    assert math.isclose(vector.norm(), found.norm, rel_tol=1e-12)


def test_bf16_encoding_is_the_rounded_delta(save: Save) -> None:
    start, end = torch.randn(50), torch.randn(50)
    base, tuned = save("base", {"w": start}), save("tuned", {"w": end})
    found = run(base, tuned.folder, encoding="bf16")
    expected = (end - start).bfloat16().float()
    np.testing.assert_array_equal(found.task_vector.block("w", 0, 50), expected.numpy())
    assert found.task_vector.payload_bytes == 100
    assert math.isclose(found.norm, float(expected.double().norm()), rel_tol=1e-12)


def test_the_payload_is_the_data_section_and_the_header_can_be_made_again(
    save: Save, tmp_path: Path
) -> None:
    start = {"same": torch.ones(5), "w": torch.zeros(6, 2), "x": torch.zeros(3)}
    end = {"same": torch.ones(5), "w": torch.randn(6, 2), "x": torch.ones(3)}
    found = run(save("base", start), save("tuned", end).folder)
    vector = found.task_vector
    payload = vector.path.read_bytes()[vector.payload_start :]
    assert len(payload) == vector.payload_bytes == sum(e.nbytes for e in found.entries)
    at = 0
    for entry in found.entries:
        piece = payload[at : at + entry.nbytes]
        assert entry.sha256 == hashlib.sha256(piece).hexdigest()
        at += entry.nbytes
    header = vector_header(
        found.entries, kind="full", encoding="fp32", base_digest=DIGEST, scaling={}
    )
    (tmp_path / "again").write_bytes(header + payload)
    again = TaskVector.open(tmp_path / "again")
    assert again.entries() == vector.entries()
    np.testing.assert_array_equal(again.block("w", 0, 12), end["w"].reshape(-1).numpy())


def test_unchanged_tensors_and_buffers_are_left_out(save: Save) -> None:
    start = {"w": torch.zeros(4), "same": torch.ones(4), "ids": torch.arange(3)}
    end = {"w": torch.ones(4), "same": torch.ones(4), "ids": torch.arange(3) + 1}
    found = run(save("base", start), save("tuned", end).folder)
    assert found.task_vector.names == {"w"}
    assert found.unchanged == ("same",)
    assert found.kept_home == (("ids", "buffer of type I64"),)
    np.testing.assert_array_equal(found.task_vector.block("same", 1, 3), [0, 0])


def test_frozen_tensors_may_be_absent(save: Save) -> None:
    start = {"w": torch.zeros(4), "frozen": torch.ones(4)}
    found = run(save("base", start), save("tuned", {"w": torch.ones(4)}).folder)
    assert found.missing == ("frozen",)
    assert found.task_vector.names == {"w"}


def test_heads_stay_at_home(save: Save, tmp_path: Path, make_bert: Callable[..., Any]) -> None:
    from transformers import BertForSequenceClassification, BertModel

    make_bert(BertModel).save_pretrained(tmp_path / "base")
    make_bert(BertForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "tuned")
    base = Checkpoint.open(tmp_path / "base")
    found = run(base, tmp_path / "tuned", private=["pooler.*"])
    assert dict(found.kept_home) == {
        "classifier.bias": "not a tensor of the release",
        "classifier.weight": "not a tensor of the release",
        "pooler.dense.bias": "private: pooler.*",
        "pooler.dense.weight": "private: pooler.*",
    }
    assert found.task_vector.names == {n for n in base.tensors if not n.startswith("pooler.")}


def test_a_private_pattern_holds_under_the_name_of_either_side(save: Save) -> None:
    base = save("base", {"a.w": torch.zeros(3), "head.w": torch.zeros(3), "b.w": torch.zeros(3)})
    tuned = {"m.a.w": torch.ones(3), "m.head.w": torch.ones(3), "m.b.w": torch.ones(3)}
    folder = save("tuned", tuned).folder
    for pattern in ("head.*", "m.head.*"):
        found = run(base, folder, private=[pattern])
        assert found.task_vector.names == {"a.w", "b.w"}
        assert found.kept_home == (("head.w", f"private: {pattern}"),)


def test_a_tie_saved_once_follows_its_twin(save: Save) -> None:
    """The release holds both tied tensors, the fine-tune only one of them."""
    shared = torch.randn(6, 4)
    base = save("base", {"embed.w": shared, "lm_head.w": shared.clone(), "w": torch.zeros(2)})
    moved = shared + 1
    found = run(base, save("tuned", {"embed.w": moved, "w": torch.zeros(2)}).folder)
    assert found.task_vector.names == {"embed.w", "lm_head.w"}
    assert found.missing == ()
    for name in found.task_vector.names:
        expected = (moved - shared).reshape(-1).numpy()
        np.testing.assert_array_equal(found.task_vector.block(name, 0, 24), expected)


def test_equal_constants_are_not_ties(save: Save) -> None:
    base = save("base", {"a": torch.ones(4, 4), "b": torch.ones(4, 4)})
    found = run(base, save("tuned", {"a": torch.ones(4, 4) * 2}).folder)
    assert found.task_vector.names == {"a"}
    assert found.missing == ("b",)


def test_a_tie_saved_twice_is_an_alias_and_not_a_new_head(save: Save) -> None:
    base = save("base", {"embed.w": torch.zeros(6, 4)})
    moved = torch.randn(6, 4)
    found = run(base, save("tuned", {"embed.w": moved, "lm_head.w": moved.clone()}).folder)
    assert found.kept_home == ()
    assert found.task_vector.names == {"embed.w"}


def test_shapes_that_differ_name_the_first_three(save: Save) -> None:
    start = {f"w{i}": torch.zeros(3) for i in range(5)}
    end = {f"w{i}": torch.zeros(4) for i in range(5)}
    error = failure(save("base", start), save("tuned", end).folder)
    assert error.code == "extract.shape_mismatch"
    assert "5 tensors" in error.message
    assert "w0, w1, w2, …" in error.message
    assert error.got == "[4], [4], [4]"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(save: Save, poison: float) -> None:
    end = torch.ones(2**18 + 5)
    end[-1] = poison
    error = failure(save("base", {"w": torch.zeros_like(end)}), save("tuned", {"w": end}).folder)
    assert error.code == "extract.not_finite"
    assert "w" in error.message


def test_a_difference_that_overflows_is_refused(save: Save) -> None:
    base, tuned = (
        save("base", {"w": torch.tensor([-3e38])}),
        save("tuned", {"w": torch.tensor([3e38])}),
    )
    assert failure(base, tuned.folder).code == "extract.not_finite"


def test_nothing_changed_is_refused(save: Save) -> None:
    base = save("base", {"w": torch.ones(3)})
    assert (
        failure(base, save("tuned", {"w": torch.ones(3)}).folder).code == "extract.nothing_changed"
    )


def test_another_model_is_refused(save: Save) -> None:
    base = save("base", {"w": torch.ones(3)})
    assert failure(base, save("tuned", {"v": torch.ones(3)}).folder).code == "extract.no_match"


def test_a_quantized_fine_tune_is_refused(save: Save) -> None:
    base = save("base", {"w": torch.ones(3)})
    tuned = save("tuned", {"w": torch.ones(3, dtype=torch.int8)})
    assert failure(base, tuned.folder).code == "extract.dtype_mismatch"


def test_the_same_input_gives_the_same_bytes(save: Save, tmp_path: Path) -> None:
    base, tuned = save("base", {"w": torch.zeros(9)}), save("tuned", {"w": torch.randn(9)})
    first, second = tmp_path / "1", tmp_path / "2"
    for out in (first, second):
        extract(base, tuned.folder, out, base_digest=DIGEST)
    assert first.read_bytes() == second.read_bytes()


def test_progress_counts_every_element(save: Save) -> None:
    seen: list[int] = []
    base, tuned = (
        save("base", {"w": torch.zeros(700_000)}),
        save("tuned", {"w": torch.ones(700_000)}),
    )
    run(base, tuned.folder, progress=seen.append)
    assert sum(seen) == 700_000
    assert len(seen) > 1


values = arrays(np.float32, 8, elements=st.floats(-(2.0**100), 2.0**100, width=32))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values, values)
def test_any_two_models_give_their_float32_difference(
    tmp_path: Path, start: np.ndarray, end: np.ndarray
) -> None:
    for name, array in (("base", start), ("tuned", end)):
        (tmp_path / name).mkdir(exist_ok=True)
        save_file({"w": torch.from_numpy(array.copy())}, tmp_path / name / "model.safetensors")
    base = Checkpoint.open(tmp_path / "base")
    if (start == end).all():
        assert failure(base, tmp_path / "tuned").code == "extract.nothing_changed"
    else:
        vector = run(base, tmp_path / "tuned").task_vector
        np.testing.assert_array_equal(vector.block("w", 0, 8), end - start)
        vector.path.unlink()


GOOD = {
    "coldmerge.kind": "full",
    "coldmerge.encoding": "fp32",
    "coldmerge.base_digest": DIGEST,
    "coldmerge.scaling": "{}",
}
LORA = {"coldmerge.kind": "lora", "coldmerge.scaling": json.dumps({"w": 1.0})}
PAIR = {"w.lora_A": torch.ones(2, 3), "w.lora_B": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("code", "metadata", "tensors"),
    [
        ("task_vector.not_one", {"coldmerge.kind": "other"}, {}),
        ("task_vector.not_one", {"coldmerge.encoding": "int3"}, {}),
        ("task_vector.not_one", {"coldmerge.scaling": "[1]"}, {}),
        ("task_vector.not_one", {"coldmerge.scaling": '{"w": NaN}'}, {}),
        ("task_vector.not_one", {"coldmerge.scaling": '{"w": []}'}, {}),
        ("task_vector.malformed", {"coldmerge.encoding": "bf16"}, {"w": torch.ones(1)}),
        ("task_vector.malformed", {}, PAIR),
        ("task_vector.malformed", LORA, {"w.lora_A": PAIR["w.lora_A"]}),
        ("task_vector.malformed", LORA, {**PAIR, "w": torch.ones(4, 3)}),
        ("task_vector.malformed", LORA, {**PAIR, "w.lora_B": torch.ones(4, 3)}),
        ("task_vector.malformed", LORA | {"coldmerge.scaling": "{}"}, PAIR),
        ("task_vector.malformed", LORA, {"w": torch.ones(1)}),
    ],
)
def test_a_file_that_is_no_task_vector_is_refused(
    tmp_path: Path, code: str, metadata: dict[str, str], tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "f", GOOD | metadata)
    with pytest.raises(ColdmergeError) as caught:
        TaskVector.open(tmp_path / "f")
    assert caught.value.code == code
