"""Rank-r adapters against numpy's SVD, PEFT's own loading and merging, and our reader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.adapter_writer import write_adapter
from coldmerge.core.adapters import Adapter
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import AdapterDelta, open_delta
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.low_rank import Choice, LowRank, factorize, factors
from tests.support import write_model

pytestmark = [  # PEFT is behind transformers here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
DIGEST = "cd" * 32


def shrink(base: Path, tuned: Path, choice: Choice, **options: Any) -> LowRank:
    opened = Checkpoint.open(base)
    delta = open_delta(opened, tuned, DIGEST)
    out = tuned.parent / "factors.safetensors"
    return factorize(opened, delta, out, choice, label="tuned", **options)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 8),
    true_rank=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_factors_are_the_truncated_svd(
    rows: int, columns: int, rank: int, true_rank: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    product = draw.standard_normal((rows, true_rank)) @ draw.standard_normal((true_rank, columns))
    matrix = product.astype(np.float32)
    rank = min(rank, rows, columns)
    a, b = factors(matrix, rank)
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = math.sqrt(float(np.square(values[rank:]).sum()))
    assert np.linalg.norm(matrix - b @ a) <= best + 1e-6 * (values[0] + 1)
    lengths = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)
    np.testing.assert_allclose(lengths, values[:rank], atol=1e-5 * (values[0] + 1))


def test_a_change_of_that_rank_is_kept_exactly(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    start = draw.standard_normal((30, 20)).astype(np.float32)
    change = (draw.standard_normal((30, 3)) @ draw.standard_normal((3, 20))).astype(np.float32)
    base = write_model(tmp_path / "base", {"m.proj.weight": np.zeros_like(start)})
    tuned = write_model(tmp_path / "tuned", {"m.proj.weight": change})
    found = shrink(base, tuned, Choice(3, 12.0))
    assert found.relative_error < 1e-6
    got = found.vector.block("m.proj.weight", 0, 600).reshape(30, 20)
    np.testing.assert_allclose(got, change, atol=1e-5)
    assert found.vector.scaling == {"m.proj.weight": 4.0}
    assert found.vector.base_digest == DIGEST


@pytest.mark.parametrize("encoding", ["fp32", "bf16"])
def test_the_account_is_true(tmp_path: Path, encoding: str) -> None:
    draw = np.random.default_rng(2)
    shapes = {
        "embed_tokens.weight": (50, 16),
        "h.0.attn.weight": (16, 16),
        "h.0.norm.weight": (16,),
        "h.0.small.weight": (2, 16),
        "h.0.same.weight": (16, 8),
        "h.0.table": (4, 4),
    }
    start = {n: draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    end = {
        n: (x + (draw.standard_normal(x.shape) if "same" not in n else 0)).astype(np.float32)
        for n, x in start.items()
    }
    base, tuned = write_model(tmp_path / "base", start), write_model(tmp_path / "tuned", end)
    found = shrink(base, tuned, Choice(4, 4.0), encoding=encoding)
    deltas = {n: (end[n] - start[n]).astype(np.float64) for n in shapes}
    assert [one.name for one in found.factored] == ["h.0.attn.weight", "h.0.small.weight"]
    assert [one.rank for one in found.factored] == [4, 2]
    assert {one.name: one.reason for one in found.left_out} == {
        "embed_tokens.weight": "an embedding",
        "h.0.norm.weight": "not a matrix",
        "h.0.table": "not the weight of a layer",
    }
    assert found.unchanged == ("h.0.same.weight",)
    total = math.sqrt(sum(float(np.square(d).sum()) for d in deltas.values()))
    assert math.isclose(found.norm, total, rel_tol=1e-12)
    lost = 0.0
    for one in found.factored:
        delta = deltas[one.name]
        got = found.vector.block(one.name, 0, delta.size).reshape(delta.shape)
        error = float(np.linalg.norm(delta - got))
        assert math.isclose(one.error, error, rel_tol=1e-5, abs_tol=1e-5)
        assert math.isclose(one.norm, float(np.linalg.norm(delta)), rel_tol=1e-12)
        lost += one.error**2
    for left in found.left_out:
        share = float(np.square(deltas[left.name]).sum()) / total**2
        assert math.isclose(found.share(left), share, rel_tol=1e-12)
        lost += left.norm**2
    assert math.isclose(found.relative_error_with_left_out, math.sqrt(lost) / total, rel_tol=1e-9)


def nudge(model: Any, seed: int, scale: float = 0.05) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * scale)


def bert(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    model = BertModel(config)
    model.save_pretrained(folder)
    return model


def gpt2(folder: Path) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(folder)
    return model


def llama(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [bert, gpt2, llama])
@pytest.mark.parametrize(("rank", "alpha"), [(3, 3.0), (6, 32.0), (100, 8.5)])
def test_peft_loads_it_and_merges_to_base_plus_product(
    tmp_path: Path, make: Callable[[Path], Any], rank: int, alpha: float
) -> None:
    from peft import PeftModel

    model = make(tmp_path / "base")
    nudge(model, 3)
    model.save_pretrained(tmp_path / "tuned")
    base = Checkpoint.open(tmp_path / "base")
    found = shrink(tmp_path / "base", tmp_path / "tuned", Choice(rank, alpha))
    write_adapter(found.vector, base, tmp_path / "adapter", rank, alpha)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fresh = type(model).from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    end = Checkpoint.open(tmp_path / "merged")
    ours = AdapterDelta(base, Adapter(tmp_path / "adapter"))
    assert ours.names == found.vector.names
    assert len(ours.names) >= 8
    for name, spec in base.tensors.items():
        start, got = base.block(name, 0, spec.size), end.block(name, 0, spec.size)
        expected = start + found.vector.block(name, 0, spec.size)
        np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=name)
        if name in ours.names:
            for at in range(0, spec.size, 37):
                np.testing.assert_allclose(
                    ours.block(name, at, min(at + 37, spec.size)),
                    found.vector.block(name, at, min(at + 37, spec.size)),
                    atol=1e-6,
                )
    if rank == 100:
        assert found.relative_error < 1e-5
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert set(config["rank_pattern"].values()) < set(range(1, 100))


def test_part_of_a_mixture_and_what_is_private_stay_out() -> None:
    choice = Choice(4, 4.0, targets=("*_proj", "gate"), private=("secret*",))

    def reason(name: str) -> str:
        return choice.reason_to_leave_out(name, (8, 8), mixture=True)

    assert reason("layers.0.q_proj.weight") == ""
    assert "mixture" in reason("layers.0.experts.3.up_proj.weight")
    assert "mixture" in reason("layers.0.mlp.gate.weight")
    assert reason("layers.0.mlp.gate_up.weight") == "not among the targets"
    assert reason("secret.q_proj.weight") == "private: secret*"


def code(call: Callable[[], object]) -> str:
    with pytest.raises(ColdmergeError) as caught:
        call()
    assert caught.value.hint
    return caught.value.code


def test_refusals(tmp_path: Path) -> None:
    start = {"a.q.weight": np.ones((4, 4), np.float32), "a.norm.weight": np.ones(4, np.float32)}
    base = write_model(tmp_path / "base", start)
    moved = write_model(tmp_path / "n", start | {"a.norm.weight": np.zeros(4, np.float32)})
    wrong = start | {"a.q.weight": np.full((4, 4), np.nan, np.float32)}
    broken = write_model(tmp_path / "broken", wrong)
    assert code(lambda: Choice(0, 1.0)) == "low_rank.bad_rank"
    assert code(lambda: Choice(4, 0.0)) == "low_rank.bad_rank"
    nothing = "low_rank.nothing_to_factorize"
    assert code(lambda: shrink(base, moved, Choice(2, 2.0))) == nothing
    assert code(lambda: shrink(base, broken, Choice(2, 2.0))) == "weights.not_finite"
    assert not list(tmp_path.glob("factors*"))
