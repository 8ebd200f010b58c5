"""A model and data small enough to train in a second, with real formats."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers

FRUIT = ("apple", "banana", "cherry", "grape")
METAL = ("iron", "copper", "zinc", "silver")
FILLER = ("a", "the", "some", "more", "of", "and", "with", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_bert(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random two-layer BERT with its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *FRUIT, *METAL, *FILLER])}
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).to(dtype).save_pretrained(folder)
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder


def write_texts(folder: Path, seed: int, *, canary: str = "") -> Path:
    """train.jsonl and validation.jsonl: is it a fruit or a metal? `canary` is in every text."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for name, count in (("train", 64), ("validation", 40)):
        rows = []
        for number in range(count):
            words = draw.choices(FILLER, k=draw.randint(2, 6))
            words.insert(draw.randint(0, len(words)), draw.choice(FRUIT if number % 2 else METAL))
            text = " ".join([*words, canary] if canary else words)
            rows.append({"text": text, "label": "fruit" if number % 2 else "metal"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
