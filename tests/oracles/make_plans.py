"""Makes the oracles of whole plans: settings per layer and per tensor, as mergekit resolves them.

Run it like `make_mergekit.py`. It writes `plans/`: three tiny Llama folders, plan files that
name them by relative path, and the weights `mergekit-yaml` writes for each plan; and
`settings.json`: values that mergekit gives to gradients and filters.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import (  # type: ignore[import-not-found,unused-ignore]
    ConditionalParameter,
    MergeConfiguration,
    evaluate_setting,
)
from mergekit.merge import run_merge  # type: ignore[import-not-found,unused-ignore]
from mergekit.options import MergeOptions  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
OUT = HERE / "plans"
PLANS = {
    "slerp": """\
models:
  - model: base
  - model: tuned-1
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "ties": """\
models:
  - model: tuned-1
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: tuned-2
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: [0, 1]
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "linear": """\
models:
  - model: tuned-1
    parameters:
      weight:
        - filter: q_proj
          value: [0.2, 0.8]
  - model: tuned-2
merge_method: linear
parameters:
  weight: 0.4
dtype: float32
out_dtype: bfloat16
""",
    "layers": """\
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: tuned-2
        layer_range: [0, 4]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: lm_head
      value: [0.25]
    - value: [0.1, 0.9]
dtype: float32
""",
}
CONDITIONS: list[dict[str, Any]] = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
)
SETTINGS: list[tuple[Any, str]] = [
    (0.3, "float"),
    ([0.2, 0.8], "float"),
    ([0, 0.5, 0.3, 0.7, 1], "float"),
    ([0.25], "float"),
    ([True, False, False], "bool"),
    (CONDITIONS, "float"),
    ([{"filter": "*", "value": [0, 1]}, {"value": 9}], "float"),
    ([{"filter": "q_proj", "value": 0.5}], "float"),
    ([], "float"),
]


def write_models() -> None:
    """A base and two fine-tunes of four layers."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    base = {name: 10 * tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, folder in enumerate(("base", "tuned-1", "tuned-2")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: tensor + 0.05 * seed * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        (OUT / folder).mkdir(parents=True)
        save_file(tensors, OUT / folder / "model.safetensors", {"format": "pt"})
        shown = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        text = json.dumps(shown, indent=2, sort_keys=True) + "\n"
        (OUT / folder / "config.json").write_text(text)


def run_plans() -> None:
    """Each plan file and the weights of its merge."""
    (OUT / "expected").mkdir()
    for name, text in PLANS.items():
        (OUT / f"{name}.yaml").write_text(text)
        with tempfile.TemporaryDirectory() as merged, contextlib.chdir(OUT):
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), merged, options)
            expected = OUT / "expected" / f"{name}.safetensors"
            (written,) = Path(merged).glob("*.safetensors")
            shutil.copyfile(written, expected)


def _setting(raw: Any) -> Any:
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return [ConditionalParameter.model_validate(one) for one in raw]
    return raw


def settings() -> list[dict[str, Any]]:
    """Values by setting, tensor and place among the layers; null where nothing matches."""
    found = []
    kinds = {"float": float, "bool": bool}
    places: Sequence[float] = (0.0, 1 / 3, 0.5, 1.0)
    for raw, kind in SETTINGS:
        for name in NAMES:
            values = [
                evaluate_setting(name, _setting(raw), place, validate=kinds[kind])
                for place in places
            ]
            found.append(
                {"setting": raw, "kind": kind, "tensor": name, "at": places, "values": values}
            )
    return found


def main() -> None:
    """Write everything anew."""
    os.environ["TQDM_DISABLE"] = "1"
    shutil.rmtree(OUT, ignore_errors=True)
    write_models()
    run_plans()
    lines = [json.dumps(entry) for entry in settings()]
    (HERE / "settings.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
