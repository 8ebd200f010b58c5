"""A linear head on the mean of the body's states: for sentence encoders, which have no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

TASK = "mean-pooled-classification"
"""What a kept head of this kind is for."""


class MeanPooled(torch.nn.Module):
    """`body` is an AutoModel; the head is `classifier`, one row per label."""

    def __init__(self, body: Any, labels: Sequence[str]) -> None:
        super().__init__()
        self.body = body
        self.classifier = torch.nn.Linear(body.config.hidden_size, len(labels))

    @property
    def config(self) -> Any:
        """The body's configuration."""
        return self.body.config

    @property
    def base_model(self) -> Any:
        """The body, as transformers calls it."""
        return self.body

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        """Logits [batch, labels], and the loss where labels are given."""
        states = self.body(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        logits = self.classifier((states * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: str, **settings: Any) -> None:
        """The body alone, under the release's own names: the head is kept elsewhere."""
        self.body.save_pretrained(folder, **settings)
