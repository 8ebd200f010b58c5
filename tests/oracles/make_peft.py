"""Makes the PEFT oracle vectors in `peft/`: adapter folders, and what PEFT merges them to.

Run it from the root of the repository with the Python of an environment that has PEFT 0.21
(mergekit's has): `ENV/bin/python tests/oracles/make_peft.py`. Everything is seeded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
OUT = HERE / "peft"
RANKS = {"adapter-1": (2, 4.0), "adapter-2": (3, 6.0), "adapter-3": (4, 1.0)}
CASES: list[tuple[str, dict[str, float], int | None]] = [
    ("cat", {"adapter-1": 1.0}, None),
    ("cat", {"adapter-1": 1.0, "adapter-2": 1.0}, None),
    ("cat", {"adapter-1": 0.5, "adapter-2": -0.25, "adapter-3": 2.0}, None),
    ("svd", {"adapter-1": 0.5, "adapter-2": 0.5}, 2),
    ("svd", {"adapter-1": 0.5, "adapter-2": -0.25, "adapter-3": 2.0}, 4),
    ("svd", {"adapter-1": 1.0, "adapter-2": 1.0, "adapter-3": 1.0}, 5),
]


class Tiny(torch.nn.Module):
    """Two linear layers, one wide and one tall."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 13, bias=False)
        self.down = torch.nn.Linear(13, 5, bias=False)


def adapted() -> PeftModel:
    """The model with every adapter, both factors random, none with rsLoRA."""
    torch.manual_seed(5)
    model: Any = Tiny()
    save_file(model.state_dict(), OUT / "base.safetensors", {"format": "pt"})
    for name, (rank, alpha) in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["up", "down"])
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def merged(model: PeftModel, case: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The delta of each layer under the merged adapter of one case."""
    kind, weights, rank = CASES[case]
    name = f"merged-{case}"
    options = {} if rank is None else {"svd_rank": rank}
    model.base_model.add_weighted_adapter(
        list(weights), list(weights.values()), name, combination_type=kind, **options
    )
    for layer in ("up", "down"):
        module = getattr(model.base_model.model, layer)
        yield f"{layer}.weight", module.get_delta_weight(name).detach().contiguous()


def tidy(folder: Path) -> None:
    """No card, and a configuration whose set of modules has one order."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Write everything anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    model = adapted()
    model.save_pretrained(OUT)
    for folder in RANKS:
        tidy(OUT / folder)
    expected, entries = {}, []
    for case, (kind, weights, rank) in enumerate(CASES):
        entries.append({"case": case, "combination": kind, "weights": weights, "rank": rank})
        for name, delta in merged(model, case):
            expected[f"{case}/{name}"] = delta
    save_file(expected, OUT / "expected.safetensors")
    lines = [json.dumps(entry) for entry in entries]
    (OUT / "cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
