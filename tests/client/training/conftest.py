"""Tiny models with real tokenizers, built here, and small data that can be learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from coldmerge_client.training import TrainConfig, TrainJob
from coldmerge_client.training.models import quiet
from tests.tiny import VOCABULARY, make_tokenizer, sentences, write_bert


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose tensors have no model prefix, as encoders are published."""
    return write_bert(tmp_path_factory.mktemp("bert"), layers=3)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    model = tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]")
    with quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(model, "$A", None, eos_token="</s>").save_pretrained(folder)
    return folder


Rows = Sequence[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 texts to train on and 20 to validate with, two classes."""
    folder = tmp_path / "data"
    write_jsonl(folder / "train.jsonl", sentences(40, 1))
    write_jsonl(folder / "validation.jsonl", sentences(20, 2))
    return folder


Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(data: Path) -> Configure:
    def make(**settings: Any) -> TrainConfig:
        defaults = {
            "data": data,
            "batch_size": 8,
            "lr": 1e-3,
            "max_length": 16,
            "device": "cpu",
            "bf16": False,
        }
        return TrainConfig.parse({**defaults, **settings})

    return make


Job = Callable[..., TrainJob]


@pytest.fixture
def job(tmp_path: Path, bert: Path) -> Job:
    def make(config: TrainConfig, name: str = "run", **settings: Any) -> TrainJob:
        defaults: dict[str, Any] = {"release": bert, "head": None, "seed": 3}
        return TrainJob(out=tmp_path / name, config=config, **{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, Rows], Path]:
    return write_jsonl
