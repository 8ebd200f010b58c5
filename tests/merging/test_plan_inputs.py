"""Model folders, adapters and task vectors in one plan; names, shapes and vocabularies."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from coldmerge.core.adapters import Adapter
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import content_entries
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.merging.plan import Opened, load
from coldmerge.merging.plan.adapters import run_adapters
from tests.merging.models import adapter, adapter_deltas, llama, tensors, write_plan
from tests.merging.plans import merged, plan_text, refused

BASE = tensors(0)
Q0, EMBED, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base")


def vector(base: Path, tuned: Path, out: Path, digest: str | None = None) -> Path:
    opened = Checkpoint.open(base)
    extract(opened, tuned, out, base_digest=digest or content_entries(opened).digest)
    return out


def test_folders_adapters_and_task_vectors_mix(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    vector(base, llama(tmp_path / "two", 2), tmp_path / "two.safetensors")
    deltas = adapter_deltas(adapter(tmp_path / "lora"))
    found, notes = merged(tmp_path, plan_text("one", "two.safetensors", "lora"))
    for name, array in BASE.items():
        expected = array.astype(np.float64)
        for seed in (1, 2):
            expected = expected + (tensors(seed)[name].astype(np.float64) - array)
        expected = expected + deltas.get(name, 0.0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6, err_msg=name)
    assert notes == []


@pytest.mark.parametrize("under", ["base", "one"])
def test_a_model_with_an_adapter_is_the_model_with_it_merged_in(
    tmp_path: Path, base: Path, under: str
) -> None:
    llama(tmp_path / "one", 1)
    deltas = adapter_deltas(adapter(tmp_path / "lora"))
    found, _ = merged(tmp_path, plan_text(f"{under}+lora"))
    for name, array in tensors(1 if under == "one" else 0).items():
        expected = array.astype(np.float64) + deltas.get(name, 0.0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6, err_msg=name)


def test_a_method_without_a_base_may_begin_with_an_adapted_model(tmp_path: Path) -> None:
    llama(tmp_path / "one", 1)
    llama(tmp_path / "two", 2)
    deltas = adapter_deltas(adapter(tmp_path / "lora"))
    found, _ = merged(tmp_path, plan_text("one+lora", "two", method="linear"))
    expected = (tensors(1)[Q0] + deltas[Q0] + tensors(2)[Q0]) / 2
    np.testing.assert_allclose(found[Q0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_inputs_of_any_float_type_merge_into_the_type_of_the_base(
    tmp_path: Path, dtype: str
) -> None:
    llama(tmp_path / "base", dtype=dtype)
    llama(tmp_path / "one", 1, dtype="bfloat16")
    llama(tmp_path / "two", 2, dtype="float16")
    found, _ = merged(tmp_path, plan_text("one", "two", method="linear"))
    assert {str(x.dtype) for x in found.values()} == {"bfloat16"}
    (tmp_path / "out").rename(tmp_path / "first")
    found, _ = merged(tmp_path, plan_text("one", "two"))
    assert {str(x.dtype) for x in found.values()} == {dtype}


def test_wrapped_names_are_followed_and_other_tensors_left_out(tmp_path: Path, base: Path) -> None:
    tuned = {f"base_model.model.{name}": x for name, x in tensors(1).items()}
    extra = {"value_head.weight": np.ones(3, np.float32)}
    llama(tmp_path / "one", 1, changes={**dict.fromkeys(BASE), **tuned, **extra})
    found, notes = merged(tmp_path, plan_text("one"))
    np.testing.assert_allclose(found[Q0], tensors(1)[Q0], atol=1e-6)
    assert len(notes) == 1
    assert "value_head.weight" in notes[0]


def test_tied_weights_that_are_saved_once_are_followed(tmp_path: Path) -> None:
    llama(tmp_path / "base", changes={HEAD: BASE[EMBED]})
    llama(tmp_path / "one", 1, changes={HEAD: None})
    found, _ = merged(tmp_path, plan_text("one"))
    np.testing.assert_array_equal(found[HEAD], found[EMBED])
    np.testing.assert_allclose(found[HEAD], tensors(1)[EMBED], atol=1e-6)


def test_missing_tensors_are_refused_by_name(tmp_path: Path, base: Path) -> None:
    names = sorted(name for name in BASE if "mlp" in name)
    llama(tmp_path / "one", 1, changes=dict.fromkeys(names))
    error = refused(tmp_path, plan_text("one"))
    assert error.code == "plan.tensors_missing"
    assert f"one lacks 4 tensors of the base: {', '.join(names[:3])}, …" in error.message
    assert "line 4" in error.message


def test_other_shapes_are_refused_naming_the_first_three(tmp_path: Path, base: Path) -> None:
    names = sorted(name for name in BASE if "proj" in name)
    wrong = {name: np.ones((3, 5), np.float32) for name in names}
    llama(tmp_path / "one", 1, changes=wrong)
    error = refused(tmp_path, plan_text("one"))
    assert "extract.shape_mismatch" in error.message
    assert f"8 tensors of the fine-tune have another shape: {', '.join(names[:3])}" in error.message
    assert "line 4" in error.message


def test_an_adapter_for_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "wide", width=16)
    error = refused(tmp_path, plan_text("wide"))
    assert "adapter.shape_mismatch" in error.message
    adapter(tmp_path / "strange", name="query_key_value")
    assert "extract.no_match" in refused(tmp_path, plan_text("strange")).message


@pytest.mark.parametrize(
    ("trained_on", "told"), [("owner/Base", False), ("./base/", False), ("owner/other", True)]
)
def test_an_adapter_that_names_another_base_is_noted(
    tmp_path: Path, base: Path, trained_on: str, told: bool
) -> None:
    config = adapter(tmp_path / "lora") / "adapter_config.json"
    body = json.loads(config.read_text()) | {"base_model_name_or_path": trained_on}
    config.write_text(json.dumps(body))
    _, notes = merged(tmp_path, plan_text("lora"))
    assert notes == (
        ["lora: the adapter says it was trained on owner/other, and goes onto base."]
        if told
        else []
    )


def test_a_task_vector_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    vector(base, llama(tmp_path / "one", 1), tmp_path / "v.safetensors", "ab" * 32)
    error = refused(tmp_path, plan_text("v.safetensors"))
    assert "task_vector.other_base" in error.message
    assert error.got == "ab" * 32


def test_a_base_is_needed_and_is_a_model(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "lora")
    assert refused(tmp_path, plan_text("lora", method="linear")).code == "plan.base_missing"
    text = plan_text("base").replace("base_model: base\n", "")
    assert refused(tmp_path, text).code == "plan.base_missing"
    assert refused(tmp_path, plan_text("base")).code == "plan.no_inputs"
    text = plan_text("base").replace("base_model: base", "base_model: lora")
    assert refused(tmp_path, text).code == "plan.base_not_a_model"


def test_a_method_that_takes_two_models_refuses_three(tmp_path: Path, base: Path) -> None:
    for seed in (1, 2):
        llama(tmp_path / f"m{seed}", seed)
    error = refused(tmp_path, plan_text("m1", "m2", method="slerp"))
    assert error.code == "plan.inputs_do_not_fit"
    assert "line 1" in error.message
    assert error.expected == "one model beside the base"


def test_a_method_that_needs_statistics_refuses_plain_folders(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    error = refused(tmp_path, plan_text("one", method="fisher"))
    assert error.code == "plan.inputs_do_not_fit"
    assert "ships no fisher statistic" in error.message
    assert "line 1" in error.message


def test_the_configuration_names_the_type_that_was_written(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    merged(tmp_path, plan_text("one", extra="dtype: bfloat16\n"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((base / "config.json").read_text())
    assert config == {**before, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(("wanted", "expected"), [("'{{ mine }}'", "{{ mine }}"), ("auto", "B")])
def test_chat_templates(tmp_path: Path, base: Path, wanted: str, expected: str) -> None:
    for seed, template in enumerate(["A", "B", "B"]):
        folder = llama(tmp_path / f"m{seed}", seed + 1)
        if seed == 1:
            (folder / "chat_template.jinja").write_text(template)
        else:
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    merged(tmp_path, plan_text("m0", "m1", "m2", extra=f"chat_template: {wanted}\n"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == expected


def test_models_are_found_where_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path / "shelf" / "owner" / "base")
    llama(tmp_path / "shelf" / "one", 1)
    llama(tmp_path / "here" / "two", 2)
    cached = tmp_path / "hub" / "models--owner--three"
    llama(cached / "snapshots" / "abc123", 3)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "here")
    text = plan_text("owner/one", "two", "owner/three").replace("model: base", "model: owner/base")
    found, _ = merged(tmp_path, text, models=tmp_path / "shelf")
    expected = sum(tensors(seed)[Q0] - BASE[Q0] for seed in (1, 2, 3)) + BASE[Q0]
    np.testing.assert_allclose(found[Q0], expected, atol=2e-6)


def test_a_model_that_is_nowhere_is_named_with_what_to_type(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    error = refused(tmp_path, plan_text("owner/gone@main"))
    assert error.code == "plan.model_not_found"
    assert "line 4" in error.message
    assert "`hf download owner/gone`" in error.hint
    error = refused(tmp_path, plan_text("base+./gone"))
    assert "the model ./gone" in error.message
    assert "hf download" not in error.hint


def adapters_plan(tmp_path: Path, method: str, extra: str = "") -> Path:
    adapter(tmp_path / "lora1", 1)
    adapter(tmp_path / "lora2", 2)
    text = plan_text("lora1", "lora2", method=method, extra=extra)
    return write_plan(tmp_path, text.replace("lora2\n", "lora2\n    parameters: {weight: 0.5}\n"))


@pytest.mark.parametrize(("method", "extra", "rank"), [("lora_cat", "", 4), ("lora_svd", "", 2)])
def test_adapters_merge_into_an_adapter(
    tmp_path: Path, base: Path, method: str, extra: str, rank: int
) -> None:
    plan = load(adapters_plan(tmp_path, method, extra))
    with Opened(plan) as opened:
        found = run_adapters(plan, opened, tmp_path / "new" / "out")
    one, two = (adapter_deltas(tmp_path / f"lora{i}") for i in (1, 2))
    read = Adapter(found.folder)
    target = next(t for t in read.targets.values() if Q0.endswith(t.weight))
    a, b = read.factors(target, BASE[Q0].shape)
    expected = one[Q0] + 0.5 * two[Q0]
    left, values, right = np.linalg.svd(expected)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(target.scaling * b @ a, nearest, atol=1e-5)
    assert {one.rank for one in found.tensors} == {rank}
    assert (found.relative_error < 1e-6) == (rank == 4)


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("parameters: {weight: [0, 1]}\n", "plan.adapter_gradient"),
        ("dtype: float16\n", "plan.adapter_dtype"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(
    tmp_path: Path, base: Path, extra: str, code: str
) -> None:
    plan = load(adapters_plan(tmp_path, "lora_cat", extra))
    with Opened(plan) as opened, pytest.raises(ColdmergeError) as caught:
        run_adapters(plan, opened, tmp_path / "out")
    assert caught.value.code == code
    assert "line 1" in caught.value.message


def test_a_base_that_is_an_input_counts_once_listed_or_not(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    expected = (tensors(1)[Q0].astype(np.float64) + BASE[Q0]) / 2
    for number, models in enumerate((["one"], ["base", "one"], ["one", "base"])):
        text = "base_model: base\n" + plan_text(*models, method="linear")
        found, _ = merged(tmp_path, text)
        np.testing.assert_allclose(found[Q0], expected, atol=1e-6)
        (tmp_path / "out").rename(tmp_path / f"out{number}")


def test_a_base_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    (base / "model.safetensors").unlink()
    error = refused(tmp_path, plan_text("one"))
    assert error.code == "plan.unusable_model"
    assert "line 2, column 13: base cannot be merged." in error.message


def test_one_folder_under_two_names_is_one_base(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    (tmp_path / "link").symlink_to(base)
    plan = load(write_plan(tmp_path, plan_text("link", "./one")))
    with Opened(plan) as opened:
        assert [item.label for item in opened.inputs] == ["./one"]


def test_inputs_travel_to_other_processes(tmp_path: Path, base: Path) -> None:
    llama(tmp_path / "one", 1)
    llama(tmp_path / "other", 2, words=["fox", "the", "new"])
    adapter(tmp_path / "lora")
    vector(base, tmp_path / "one", tmp_path / "v.safetensors")
    names = ("one", "other", "lora", "v.safetensors", "one+lora")
    plan = load(write_plan(tmp_path, plan_text(*names)))
    with Opened(plan, by_token=True) as opened:
        for item in opened.inputs:
            there = pickle.loads(pickle.dumps(item.source))  # noqa: S301 - our own bytes
            np.testing.assert_array_equal(there.block(Q0, 3, 30), item.source.block(Q0, 3, 30))


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user-here/model"])
def test_names_that_no_file_can_have_are_not_found(tmp_path: Path, base: Path, name: str) -> None:
    assert refused(tmp_path, plan_text(name)).code == "plan.model_not_found"
