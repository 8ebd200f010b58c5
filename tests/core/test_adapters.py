"""LoRA folders against PEFT's own merge_and_unload."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coldmerge.core.algebra import apply
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import Extraction, extract

pytestmark = [  # PEFT is behind transformers here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
DIGEST = "cd" * 32
TARGETS = ["query", "value"]


def adapt(model: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Wrap, randomize, save the adapter; returns the merged state by PEFT, prefix kept."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**({"target_modules": TARGETS} | options)))
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.2)
    wrapped.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


def run(base: Checkpoint, folder: Path, **options: Any) -> Extraction:
    return extract(base, folder, folder.parent / "v.safetensors", base_digest=DIGEST, **options)


def agree(base: Checkpoint, found: Extraction, merged: dict[str, torch.Tensor]) -> None:
    """base + τ, rounded once, is PEFT's float32 merge up to its own rounding."""
    applied = apply(base, [(found.task_vector, 1.0)], found.task_vector.path.parent / "applied")
    for name in base.tensors:
        np.testing.assert_allclose(
            applied.array(name).astype(np.float32),
            merged[name].float().numpy(),
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 16, "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"layer.0.attention.self.query": 2}},
        {
            "r": 4,
            "lora_alpha": 3,
            "rank_pattern": {"value": 6, r".*layer\.1.*": 2},
            "alpha_pattern": {r"layer\.\d+\.attention\.self\.query": 9, "value": 1},
        },
        {"r": 3, "lora_alpha": 5, "target_modules": ["word_embeddings", "dense"]},
        {"r": 2, "target_modules": "all-linear"},
        {"r": 2, "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
)
def test_deltas_are_those_of_peft(
    tmp_path: Path, make_bert: Callable[..., Any], options: dict[str, Any]
) -> None:
    from transformers import BertModel

    model = make_bert(BertModel)
    model.save_pretrained(tmp_path / "base")
    merged = adapt(model, tmp_path / "adapter", **options)
    base = Checkpoint.open(tmp_path / "base")
    found = run(base, tmp_path / "adapter")
    vector = found.task_vector
    assert vector.kind == "lora"
    assert all(vector.is_lora(name) for name in vector.names)
    agree(base, found, merged)
    total = sum(
        float(
            (merged[name].double() - torch.from_numpy(base.array(name).copy()).double())
            .square()
            .sum()
        )
        for name in base.tensors
    )
    assert math.isclose(found.norm, math.sqrt(total), rel_tol=1e-4)
    assert math.isclose(vector.norm(), found.norm, rel_tol=1e-12)


def test_blocks_are_float64_products_rounded_once(
    tmp_path: Path, make_bert: Callable[..., Any]
) -> None:
    from transformers import BertModel

    model = make_bert(BertModel)
    model.save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "adapter", r=4, lora_alpha=7, use_rslora=True)
    vector = run(Checkpoint.open(tmp_path / "base"), tmp_path / "adapter").task_vector
    stored = load_file(vector.path)
    for name in vector.names:
        assert vector.scaling[name] == 7 / math.sqrt(4)
        a, b = stored[f"{name}.lora_A"].double(), stored[f"{name}.lora_B"].double()
        expected = (b @ a * vector.scaling[name]).float().reshape(-1).numpy()
        whole = vector.block(name, 0, expected.size)
        np.testing.assert_array_equal(whole, expected)
        for step in (1, 7, 16, 100):
            parts = [vector.block(name, i, i + step) for i in range(0, expected.size, step)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("encoding", ["fp32", "bf16"])
def test_a_head_on_top_and_modules_to_save(
    tmp_path: Path, make_bert: Callable[..., Any], encoding: str
) -> None:
    """Release tensors saved whole may leave as full deltas; a new head never does."""
    from transformers import BertForSequenceClassification

    model = make_bert(BertForSequenceClassification, num_labels=2)
    model.bert.save_pretrained(tmp_path / "base")
    merged = adapt(
        model,
        tmp_path / "adapter",
        r=4,
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler"],
    )
    base = Checkpoint.open(tmp_path / "base")
    found = run(base, tmp_path / "adapter", encoding=encoding)
    vector = found.task_vector
    assert dict(found.kept_home) == {
        "base_model.model.classifier.bias": "not a tensor of the release",
        "base_model.model.classifier.weight": "not a tensor of the release",
    }
    assert not vector.is_lora("pooler.dense.weight")
    assert vector.is_lora("encoder.layer.0.attention.self.query.weight")
    if encoding == "fp32":
        body = {n.removeprefix("bert."): x for n, x in merged.items() if n.startswith("bert.")}
        agree(base, found, body)
    private = run(base, tmp_path / "adapter", private=["pooler.*", "encoder.layer.0.*"])
    assert {name.split(".")[2] for name in private.task_vector.names} == {"1"}
    assert ("pooler.dense.bias", "private: pooler.*") in private.kept_home


def test_conv1d_targets_are_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            n_positions=8,
            n_embd=12,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "base")
    merged = adapt(
        model, tmp_path / "adapter", r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    base = Checkpoint.open(tmp_path / "base")
    found = run(base, tmp_path / "adapter")
    squares = [n for n in found.task_vector.names if n.endswith("attn.c_proj.weight")]
    assert len(squares) == 2  # square: only the configuration tells that they are transposed
    state = {n: merged.get(n, merged.get(f"transformer.{n}")) for n in base.tensors}
    agree(base, found, {name: x for name, x in state.items() if x is not None})


def test_convolutions_keep_their_shape(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Conv2d(3, 5, 3)
            self.point = torch.nn.Conv2d(5, 4, 1)
            self.line = torch.nn.Conv1d(4, 2, 3)

    model = Net()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    merged = adapt(model, tmp_path / "adapter", r=2, target_modules=["wide", "point", "line"])
    base = Checkpoint.open(tmp_path / "base")
    found = run(base, tmp_path / "adapter")
    assert found.task_vector.shape("wide.weight") == (5, 3, 3, 3)
    agree(base, found, merged)


def test_an_untrained_adapter_changes_nothing(
    tmp_path: Path, make_bert: Callable[..., Any]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    model = make_bert(BertModel)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(target_modules=TARGETS))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ColdmergeError) as caught:
        run(Checkpoint.open(tmp_path / "base"), tmp_path / "adapter")
    assert caught.value.code == "extract.nothing_changed"


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Checkpoint, Path]:
    """A one-matrix base, and a hand-made adapter folder for it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file({"m.weight": torch.zeros(6, 4)}, tmp_path / "base" / "model.safetensors")
    configure(tmp_path / "adapter")
    weigh(tmp_path / "adapter")
    return Checkpoint.open(tmp_path / "base"), tmp_path / "adapter"


def configure(folder: Path, **changes: Any) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["m"]} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


def weigh(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(6, 2)} | changes
    save_file(
        {f"base_model.model.m.{name}": x for name, x in tensors.items() if x is not None},
        folder / "adapter_model.safetensors",
    )


def test_the_hand_made_adapter_is_sound(plain: tuple[Checkpoint, Path]) -> None:
    base, folder = plain
    np.testing.assert_array_equal(run(base, folder).task_vector.block("m.weight", 0, 24), [4] * 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"target_parameters": ["experts.w"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"r": 0},
        {"r": None},
        {"lora_alpha": "x"},
        {"lora_alpha": 10**400},
    ],
)
def test_kinds_that_are_not_plain_lora_are_refused(
    plain: tuple[Checkpoint, Path], changes: dict[str, Any]
) -> None:
    base, folder = plain
    configure(folder, **changes)
    with pytest.raises(ColdmergeError) as caught:
        run(base, folder)
    assert caught.value.code == "adapter.unsupported"
    assert caught.value.got is not None
    assert next(iter(changes)) in caught.value.got


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("adapter.rank_mismatch", {"lora_A.weight": torch.tensor(1.0)}),
        ("adapter.half_a_pair", {"lora_B.weight": None}),
        ("adapter.rank_mismatch", {"lora_A.weight": torch.ones(3, 4)}),
        ("adapter.shape_mismatch", {"lora_B.weight": torch.ones(7, 2)}),
        ("adapter.shape_mismatch", {"lora_B.weight": torch.ones(6, 3)}),
        ("adapter.wrong_dtype", {"lora_A.weight": torch.ones(2, 4).int()}),
        ("adapter.unknown_tensor", {"lora_magnitude_vector": torch.ones(6)}),
        ("adapter.unknown_tensor", {"lora_B.bias": torch.ones(6)}),
        ("extract.not_finite", {"lora_A.weight": torch.full((2, 4), math.nan)}),
        ("extract.nothing_changed", {"lora_A.weight": torch.zeros(2, 4)}),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    plain: tuple[Checkpoint, Path], code: str, changes: dict[str, torch.Tensor | None]
) -> None:
    base, folder = plain
    weigh(folder, **changes)
    with pytest.raises(ColdmergeError) as caught:
        run(base, folder)
    assert caught.value.code == code
    assert not list(folder.parent.glob("v.safetensors*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": ["m"]},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"([a-z.]+)+Z": 2}},
        {"alpha_pattern": {"m": "x"}},
        {"alpha_pattern": {"m": [1]}},
        {"alpha_pattern": {"m": 10**400}},
    ],
)
def test_patterns_that_are_none_are_refused(
    plain: tuple[Checkpoint, Path], changes: dict[str, Any]
) -> None:
    base, folder = plain
    configure(folder, **changes)
    with pytest.raises(ColdmergeError) as caught:
        run(base, folder)
    assert caught.value.code == "adapter.bad_config"
    assert next(iter(changes)) in caught.value.message


def test_an_alpha_that_cannot_be_known_is_refused(plain: tuple[Checkpoint, Path]) -> None:
    base, folder = plain
    configure(folder, alpha_pattern={"m": 1, ".*m": 2})
    with pytest.raises(ColdmergeError) as caught:
        run(base, folder)
    assert caught.value.code == "adapter.ambiguous_alpha"


def test_an_adapter_in_pickle_is_refused(plain: tuple[Checkpoint, Path]) -> None:
    base, folder = plain
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ColdmergeError) as caught:
        run(base, folder)
    assert caught.value.code == "adapter.no_safetensors"


def test_an_adapter_of_another_model_is_refused(plain: tuple[Checkpoint, Path]) -> None:
    _, folder = plain
    (folder.parent / "other").mkdir()
    save_file({"x": torch.zeros(1)}, folder.parent / "other" / "model.safetensors")
    with pytest.raises(ColdmergeError) as caught:
        run(Checkpoint.open(folder.parent / "other"), folder)
    assert caught.value.code == "extract.no_match"
