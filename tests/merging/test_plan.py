"""What a plan may say, and how what it may not say is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.errors import ConfigError
from coldmerge.merging.plan import load
from coldmerge.merging.plan.parameters import check_words
from tests.merging.models import write_plan

PLAN = """\
models:
  - model: one
    parameters:
      weight: 0.5
  - model: two
merge_method: linear
dtype: float16
"""


def test_a_plan_says_what_it_says(tmp_path: Path) -> None:
    plan = load(write_plan(tmp_path, PLAN))
    assert plan.method.name == "linear"
    assert [(model.name, model.where.line) for model in plan.models] == [("one", 2), ("two", 5)]
    assert plan.base is None
    assert plan.dtype == "F16"
    assert plan.text == PLAN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dtype: float32\nout_dtype: bfloat16\n", "BF16"),
        ("dtype: torch.bfloat16\n", "BF16"),
        ("dtype:\n", None),
        ("", None),
    ],
)
def test_the_type_written_is_out_dtype_or_else_dtype(
    tmp_path: Path, text: str, expected: str | None
) -> None:
    plan = "models: [{model: a}]\nmerge_method: linear\n" + text
    assert load(write_plan(tmp_path, plan)).dtype == expected


def test_a_plan_may_have_anchors_comments_and_empty_parameters(tmp_path: Path) -> None:
    text = """\
# two alike
models:
  - model: one
    parameters: &same
      weight: 0.5
  - model: two
    parameters: *same
merge_method: linear
parameters:
"""
    plan = load(write_plan(tmp_path, text))
    assert plan.slices[0].each[0] == plan.slices[0].each[1]
    assert plan.parameters is None


BROKEN = [
    # a misspelt key
    (
        "merge_method: linear\nmodels:\n  - model: a\n    paramters: {weight: 1}\n",
        ("plan.unknown_key", 4, "Did you mean `parameters`?"),
    ),
    # frankenmerge
    (
        "merge_method: passthrough\nslices: []\n",
        ("plan.unsupported", 1, "mergekit to stack layers"),
    ),
    (
        "slices:\n- sources:\n  - model: a\n    layer_range: [0, 24]\n- sources:\n  - model: a\n"
        "    layer_range: [20, 40]\nmerge_method: linear\n",
        ("plan.layer_stacking", 7, "same range"),
    ),
    (
        "slices:\n- sources:\n  - model: a\n    layer_range: [0, 4]\n  - model: b\n"
        "    layer_range: [4, 8]\nmerge_method: linear\n",
        ("plan.layer_stacking", 6, "stacking use mergekit"),
    ),
    # a mixture of experts
    (
        "base_model: a\ngate_mode: hidden\nexperts:\n- source_model: b\n",
        ("plan.unsupported", 2, "mergekit-moe"),
    ),
    # a joint vocabulary
    (
        "models: [{model: a}]\nmerge_method: linear\ntokenizer_source: union\n",
        ("plan.unsupported", 3, "tokenizer_source: base"),
    ),
    (
        "models: [{model: a}]\nmerge_method: linear\ntokenizer:\n  source: base\n  tokens: {}\n",
        ("plan.unsupported", 5, "tokenizer_source: base"),
    ),
    ("models: [{model: a}]\nmerge_method: teis\n", ("plan.unknown_method", 2, "mean `ties`?")),
    ("models:\n  - model: a\n", ("plan.missing_key", 1, "merge_method")),
    ("merge_method: linear\n", ("plan.models_or_slices", 1, "models:")),
    ("merge_method: linear\nmodels: a\n", ("plan.wrong_type", 2, "examples/merge")),
    ("merge_method: linear\nmodels:\n- model:\n", ("plan.missing_key", 3, "model:")),
    ("merge_method: linear\nmodels:\n- model: 3\n", ("plan.wrong_type", 3, "examples")),
    ("merge_method: linear\nmodels:\n- a\n", ("plan.wrong_type", 3, "examples")),
    (
        "merge_method: linear\nmodels:\n- model: a\n- model: a\n",
        ("plan.model_twice", 4, "weight"),
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\ndtype: float64\n",
        ("plan.unknown_dtype", 3, "float32"),
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\nchat_template: chatml\n",
        ("plan.chat_template_name", 3, "Paste"),
    ),
    (
        "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [3, 1]}]\n",
        ("plan.bad_layer_range", 3, "[0, 32]"),
    ),
    (
        "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
        "- sources: [{model: b, layer_range: [1, 2]}]\n",
        ("plan.slices_differ", 4, "weight of 0"),
    ),
    ("merge_method: linear\nmodels: [{model: a}\n", ("plan.not_yaml", 3, "indentation")),
    ("merge_method: linear\n---\nmodels: []\n", ("plan.not_yaml", 2, "one file each")),
    ("merge_method: linear\nmerge_method: ties\n", ("plan.bad_key", 2, "one of the two")),
    ("a: &a\n  b: *a\n", ("plan.too_deep", 1, "alias")),
    ("- merge_method\n", ("plan.wrong_type", 1, "docs/merging.md")),
    ("", ("plan.wrong_type", 1, "docs/merging.md")),
    ("merge_method: 2026-13-45\n", ("plan.bad_scalar", 1, "quotes")),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN)
def test_a_broken_plan_is_refused_with_its_line_and_a_hint(
    tmp_path: Path, text: str, expected: tuple[str, int, str]
) -> None:
    code, line, hint = expected
    with pytest.raises(ConfigError) as caught:
        load(write_plan(tmp_path, text))
    assert caught.value.code == code
    assert f"plan.yaml, line {line}, column" in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"merge_method: \x00", None])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, raw: bytes | None) -> None:
    path = tmp_path / "plan.yaml"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.code in {"plan.unreadable", "plan.not_yaml"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_to_a_plan_is_anything_but_an_error_of_its_own(data: st.DataObject) -> None:
    text = PLAN
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        new = data.draw(st.text("-[]{}:&*!|>'\"#%@,? \n\t0a.é\x00\ud800", max_size=4))
        text = text[:at] + new + text[at + cut :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        path.write_bytes(text.encode(errors="surrogatepass"))
        try:
            check_words(load(path))
        except ConfigError as error:
            assert error.hint  # noqa: PT017 - either is fine, any other error is not


def test_aliases_that_stand_for_millions_of_values_are_refused(tmp_path: Path) -> None:
    rows = ["    - {filter: a, value: &v0 [{filter: a, value: 1}, {filter: b, value: 1}]}"]
    for number in range(1, 6):
        again = ", ".join(f"{{filter: a, value: *v{number - 1}}}" for _ in range(20))
        rows.append(f"    - {{filter: a, value: &v{number} [{again}]}}")
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters:\n  weight:\n"
    with pytest.raises(ConfigError) as caught:
        load(write_plan(tmp_path, text + "\n".join(rows) + "\n"))
    assert caught.value.code == "plan.too_large"
    assert "plan.yaml, line" in caught.value.message
