from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.names import (
    canonical,
    is_private,
    match_names,
    private_pattern,
    split_factor,
    split_key,
)

part = st.sampled_from(["bert", "encoder", "layer", "0", "1", "weight", "bias", "query"])
tensor_names = st.sets(st.lists(part, min_size=1, max_size=4).map(".".join), max_size=12)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.bert.query.base_layer.weight", "bert.query.weight"),
        ("base_model.model.classifier.modules_to_save.default.weight", "classifier.weight"),
        ("base_model.model.classifier.modules_to_save.weight", "classifier.weight"),
        ("_orig_mod.encoder.0.weight", "encoder.0.weight"),
        ("module._orig_mod.encoder.0.weight", "encoder.0.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
    ],
)
def test_wrappers_are_stripped(name: str, plain: str) -> None:
    assert canonical(name) == plain


def test_a_head_on_top_strips_the_prefix() -> None:
    base = {"embeddings.weight", "encoder.0.weight", "pooler.weight"}
    names = {"bert.embeddings.weight", "bert.encoder.0.weight", "classifier.weight"}
    assert match_names(base, names) == {
        "bert.embeddings.weight": "embeddings.weight",
        "bert.encoder.0.weight": "encoder.0.weight",
        "classifier.weight": None,
    }


def test_a_body_alone_gets_the_prefix() -> None:
    base = {"bert.embeddings.weight", "bert.encoder.0.weight", "cls.bias"}
    names = {"embeddings.weight", "encoder.0.weight"}
    assert match_names(base, names) == {name: f"bert.{name}" for name in names}


def test_old_layer_norm_names_are_the_new_ones() -> None:
    base = {"bert.LayerNorm.gamma", "bert.LayerNorm.beta"}
    names = {"bert.LayerNorm.weight", "bert.LayerNorm.bias"}
    assert match_names(base, names) == {
        "bert.LayerNorm.weight": "bert.LayerNorm.gamma",
        "bert.LayerNorm.bias": "bert.LayerNorm.beta",
    }
    assert match_names(names, base) == {v: k for k, v in match_names(base, names).items()}


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_every_body_tensor_of_a_transformers_head_matches(
    head: str, make_bert: Callable[..., Any]
) -> None:
    import transformers

    body = make_bert(transformers.BertModel).state_dict()
    tuned = make_bert(getattr(transformers, head)).state_dict()
    found = match_names(body, tuned)
    for name, target in found.items():
        assert target == (name.removeprefix("bert.") if name.startswith("bert.") else None)


@given(tensor_names, tensor_names)
def test_matching_is_one_to_one_and_prefers_what_is_exact(base: set[str], names: set[str]) -> None:
    found = match_names(base, names)
    assert set(found) == names
    targets = [target for target in found.values() if target is not None]
    assert len(set(targets)) == len(targets)
    assert set(targets) <= base
    assert all(found[name] == name for name in base & names)


@given(tensor_names, part)
def test_a_common_prefix_never_hides_a_tensor(base: set[str], prefix: str) -> None:
    wrapped = {f"base_model.model.{prefix}.{name}" for name in base}
    found = match_names(base, wrapped)
    exact = {name for name in base if f"{prefix}.{name}" in base}
    if not exact:
        assert found == {f"base_model.model.{prefix}.{name}": name for name in base}


def test_privacy_is_case_sensitive_and_in_doubt_stays_at_home() -> None:
    patterns = ["classifier.*", "*.adapter_?.weight"]
    for name in (
        "classifier.weight",
        "bert.classifier.dense.weight",
        "base_model.model.classifier.modules_to_save.default.weight",
        "a.b.adapter_7.weight",
    ):
        assert is_private(name, patterns), name
    for name in ("Classifier.weight", "my_classifier.weight", "a.b.adapter_77.weight"):
        assert not is_private(name, patterns), name
    assert private_pattern("x.classifier.w", patterns) == "classifier.*"
    assert not is_private("anything", [])


def test_factors_split() -> None:
    assert split_factor("a.weight.lora_A") == ("a.weight", "A")
    assert split_factor("a.weight.lora_B") == ("a.weight", "B")
    assert split_factor("a.weight") == ("a.weight", "")


def test_a_key_is_a_statistic_only_where_that_kind_is_shipped() -> None:
    shipped = {"gram": 1.0, "trim": 0.2}
    assert split_key("a.weight.gram", shipped) == ("a.weight", "gram")
    assert split_key("a.weight.gram") == ("a.weight.gram", "")
    assert split_key("a.weight.fisher", shipped) == ("a.weight.fisher", "")
    assert split_key("a.weight.lora_A", shipped) == ("a.weight", "A")
    assert split_key("gram", shipped) == ("gram", "")


def test_what_is_below_a_pooled_head_may_have_a_prefix_in_the_release() -> None:
    base = ["bert.embeddings.weight", "bert.encoder.layer.0.weight", "cls.bias"]
    names = ["body.embeddings.weight", "body.encoder.layer.0.weight", "classifier.weight"]
    assert match_names(base, names) == {
        "body.embeddings.weight": "bert.embeddings.weight",
        "body.encoder.layer.0.weight": "bert.encoder.layer.0.weight",
        "classifier.weight": None,
    }
    adapted = [f"base_model.model.{name}" for name in names]
    assert match_names(base, adapted) == {
        f"base_model.model.{name}": known for name, known in match_names(base, names).items()
    }
    other = ["encoder.layer.0.weight"]
    assert match_names(["decoder.layer.0.weight"], other) == {other[0]: None}
