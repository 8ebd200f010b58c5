"""Training on everybody's data at once, one head per task: the bound that sharing would give.

The pooled data's labels are `<set>/<label>`. One linear layer holds all heads: the loss of an
example looks at the outputs of its own set alone, which is what separate heads would do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.cold.sets import TaskSet, draw, held
from coldmerge_client.training import pooled
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.sequence_classification import SequenceClassification
from coldmerge_client.training.trainer import TrainJob

POOLED = "pooled"


def write(tasks: Sequence[TaskSet], most: int, seed: int, folder: Path) -> Path:
    """Write at most `most` of the training examples that each contributor holds as one set.

    Returns its folder. Without a validation part a contributor holds a fifth less than the set.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for task in tasks:
        chosen = draw(task, range(len(task.train)), min(most, held(task)), seed)
        for part, items in (
            ("train", [task.train[place] for place in chosen]),
            ("validation", [*task.validation, *task.test][:2]),
            ("test", task.test[:2]),
        ):
            for item in items:
                pair = {} if item.pair is None else {"text_pair": item.pair}
                label = f"{task.name}/{task.labels[item.label]}"
                rows[part].append({"text": item.text, **pair, "label": label})
    place = folder / POOLED
    place.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(rows["train"]))
    rows["train"] = [rows["train"][position] for position in order]
    for part, found in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in found)
        (place / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return place


class Heads(pooled.MeanPooled):
    """A mean-pooled body with a head for each set."""

    def __init__(self, body: Any, labels: Sequence[str]) -> None:
        super().__init__(body, labels)
        names = [label.partition("/")[0] for label in labels]
        order = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.register_buffer("_task", torch.tensor([order[name] for name in names]), False)

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        """Logits [batch, labels], and where labels are given the loss within their sets."""
        logits = super().forward(None, **inputs).logits
        if labels is None:
            return SequenceClassifierOutput(loss=None, logits=logits)
        others = self._task[None, :] != self._task[labels][:, None]
        masked = logits.float().masked_fill(others, -torch.inf)
        loss = torch.nn.functional.cross_entropy(masked, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MultiTask(SequenceClassification):
    """The product's trainer of texts, with a head for each set."""

    def load(self, job: TrainJob, labels: Sequence[str], settings: dict[str, Any]) -> Any:
        """The body under all heads."""
        return Heads(super().load(job, labels, settings).body, labels)


def create(config: TrainConfig) -> MultiTask:
    """The trainer, as a configuration names it; it needs `pooling: mean`."""
    return MultiTask(config)
