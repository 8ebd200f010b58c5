"""Model folders for the core tests: plain tensors, and tiny transformers models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from coldmerge.core.checkpoint import Checkpoint

Save = Callable[..., Checkpoint]


@pytest.fixture(autouse=True)
def _torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(7)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(name, tensors, config={}) → the opened folder."""

    def write(
        name: str, tensors: Mapping[str, torch.Tensor], config: dict[str, Any] | None = None
    ) -> Checkpoint:
        folder = tmp_path / name
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
        return Checkpoint.open(folder)

    return write


def bert(cls: Any, **kwargs: Any) -> Any:
    """A tiny BERT of the given transformers class, randomly filled."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        **kwargs,
    )
    model = cls(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.fixture
def make_bert() -> Callable[..., Any]:
    return bert
