"""Tokenized examples into padded batches, each padded to its own longest example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

Features = dict[str, Any]
"""One example: input_ids (or inputs_embeds), attention_mask, … and perhaps labels."""

IGNORED = -100
"""The label of positions that do not count: padding, and the inside of a word."""


class Collator:
    """Pads on the right: ids with the tokenizer's pad token, labels with `IGNORED`."""

    def __init__(self, tokenizer: Any) -> None:
        self._fill = {
            "attention_mask": 0,
            "input_ids": tokenizer.pad_token_id,
            "labels": IGNORED,
            "token_type_ids": tokenizer.pad_token_type_id,
        }

    def __call__(self, examples: Sequence[Features]) -> dict[str, torch.Tensor]:
        """The batch: [examples, length] each, [examples] for single labels."""
        return {name: self._column(name, examples) for name in examples[0]}

    def _column(self, name: str, examples: Sequence[Features]) -> torch.Tensor:
        parts = [torch.as_tensor(example[name]) for example in examples]
        if parts[0].ndim == 0:
            return torch.stack(parts)
        return torch.nn.utils.rnn.pad_sequence(
            parts, batch_first=True, padding_value=self._fill.get(name, 0)
        )


def by_length(examples: Sequence[Features], size: int) -> Iterator[list[int]]:
    """Positions in groups of at most `size`, similar lengths together: little padding."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i]["attention_mask"]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def tokenize(
    tokenizer: Any, texts: Sequence[Any], pairs: Sequence[str | None], max_length: int
) -> list[Features]:
    """Encode sentences (with their pairs) or, given tuples of words, words."""
    found: list[Features] = []
    for text, pair in zip(texts, pairs, strict=True):
        words = not isinstance(text, str)
        encoded = tokenizer(
            list(text) if words else text,
            pair,
            truncation=True,
            max_length=max_length,
            is_split_into_words=words,
        )
        found.append({name: encoded[name] for name in sorted(encoded)})
    return found
