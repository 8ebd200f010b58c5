"""Tiny models with a Llama's names, adapters and plans, as files, for the tests of plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Tensors = dict[str, npt.NDArray[Any]]

WIDTH, INNER, HEADS = 8, 12, 2
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensors(seed: int, layers: int = 4, rows: int = len(WORDS), move: float = 0.1) -> Tensors:
    """The weights of a Llama: the same for every seed, but for a step of size `move`."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (rows, WIDTH),
    }
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes[f"{layer}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
    start, step = np.random.default_rng(0), np.random.default_rng(seed)
    return {
        name: (
            start.standard_normal(shape) + (move * step.standard_normal(shape) if seed else 0)
        ).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def llama(
    folder: Path,
    seed: int = 0,
    *,
    layers: int = 4,
    words: Sequence[str] | None = WORDS,
    dtype: str = "float32",
    changes: Mapping[str, npt.NDArray[Any] | None] | None = None,
) -> Path:
    """A model folder. `changes` replaces tensors, or takes them away where it says None."""
    rows = len(words) if words is not None else len(WORDS)
    found: Tensors = tensors(seed, layers, rows)
    for name, array in (changes or {}).items():
        found.pop(name, None)
        if array is not None:
            found[name] = array
    folder.mkdir(parents=True)
    save_file(
        {
            n: np.ascontiguousarray(x if x.dtype.kind in "iu" else x.astype(DTYPES[dtype]))
            for n, x in found.items()
        },
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if words is not None:
        vocabulary = {word: row for row, word in enumerate(words)}
        body = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(body))
    return folder


def adapter(folder: Path, seed: int = 1, *, width: int = WIDTH, name: str = "q_proj") -> Path:
    """A PEFT LoRA adapter of rank 2 for two layers' attention, scaling 2."""
    draw = np.random.default_rng(seed)
    factors = {}
    for number in range(2):
        stem = f"base_model.model.model.layers.{number}.self_attn.{name}"
        factors[f"{stem}.lora_A.weight"] = draw.standard_normal((2, width)).astype(np.float32)
        factors[f"{stem}.lora_B.weight"] = draw.standard_normal((width, 2)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapter_deltas(folder: Path) -> Tensors:
    """What an adapter adds, by tensor of the model, float64."""
    stored = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): 2.0
        * stored[key.replace("lora_A", "lora_B")].astype(np.float64)
        @ stored[key].astype(np.float64)
        for key in stored
        if "lora_A" in key
    }


def stored(folder: Path) -> Tensors:
    """Every tensor of a folder, whatever its shards."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write_plan(folder: Path, text: str, name: str = "plan.yaml") -> Path:
    """A plan file."""
    path = folder / name
    path.write_text(text)
    return path
