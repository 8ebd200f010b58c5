"""A model and data small enough to train in a second, with real formats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from coldmerge_client.training.models import quiet

FRUIT = ("apple", "banana", "cherry", "grape")
METAL = ("iron", "copper", "zinc", "silver")
FILLER = ("a", "the", "some", "more", "of", "and", "with", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>")
VOCABULARY = {word: place for place, word in enumerate([*SPECIAL, *FRUIT, *METAL, *FILLER])}


def write_bert(folder: Path, dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
    """A random BERT with its tokenizer, as a Hugging Face folder; no prefix in its names."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with quiet():
        transformers.BertModel(config).to(dtype).save_pretrained(folder)
    model = tokenizers.models.WordPiece(VOCABULARY, unk_token="[UNK]")
    make_tokenizer(model, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1").save_pretrained(folder)
    return folder


def make_tokenizer(model: Any, single: str, pair: str | None, **special: str) -> Any:
    """A fast tokenizer over the vocabulary; without `special` one as BERT has it."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(word, VOCABULARY[word]) for word in SPECIAL]
    )
    if not special:
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", **special
    )


def sentences(count: int, seed: int, canary: str = "") -> list[dict[str, str]]:
    """Is it a fruit or a metal? The labels take turns; `canary` is in every text."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.choices(FILLER, k=draw.randint(2, 6))
        words.insert(draw.randint(0, len(words)), draw.choice(FRUIT if number % 2 else METAL))
        text = " ".join([*words, canary] if canary else words)
        rows.append({"text": text, "label": "fruit" if number % 2 else "metal"})
    return rows


def write_texts(folder: Path, seed: int, *, canary: str = "") -> Path:
    """train.jsonl and validation.jsonl of such sentences."""
    folder.mkdir(parents=True)
    rows = sentences(104, seed, canary)
    for name, part in (("train", rows[:64]), ("validation", rows[64:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder
