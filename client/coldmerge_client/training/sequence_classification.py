"""Classify texts or pairs of texts: AutoModelForSequenceClassification, or a mean-pooled head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from coldmerge.core.progress import Progress, silent
from coldmerge_client.training import batches, data, heads, implicit, models, pooled, probe
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.huggingface import HuggingFaceTrainer, Prepared
from coldmerge_client.training.trainer import EvaluateJob, Predictions, TrainJob


class SequenceClassification(HuggingFaceTrainer):
    """One label per text."""

    task = "sequence-classification"
    auto = transformers.AutoModelForSequenceClassification

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.pooling == "mean":
            self.task = pooled.TASK

    def prepare(self, job: TrainJob, tokenizer: Any, scratch: Path) -> Prepared:
        """Texts to ids; the labels of the kept head keep their places."""
        known = heads.known_labels(job.head, self.task)
        found = data.classification(self.config.data, known, scratch)
        train = data.subset(found.train, self.config.max_examples, job.seed)

        def encoded(examples: Sequence[data.Example[int]]) -> list[batches.Features]:
            texts = [example.text for example in examples]
            pairs = [example.pair for example in examples]
            features = batches.tokenize(tokenizer, texts, pairs, self.config.max_length)
            return [
                {**feature, "labels": example.label}
                for feature, example in zip(features, examples, strict=True)
            ]

        drawn = len(train) < len(found.train)
        return Prepared(
            encoded(train), encoded(found.validation), found.labels, found.dropped, drawn
        )

    def load(self, job: TrainJob, labels: Sequence[str], settings: dict[str, Any]) -> Any:
        """The auto model, or the body under a mean-pooled linear head."""
        if self.config.pooling == "mean":
            body = models.load(transformers.AutoModel, job.release, **settings)
            return pooled.MeanPooled(body, labels)
        return super().load(job, labels, settings)

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """A probe on mean-pooled features, refitted on the training data of this release."""
        return probe.probe_texts(job, *self._halves(job), progress)

    def gradient(
        self, job: EvaluateJob, objective: str, progress: Progress = silent
    ) -> dict[str, probe.Floats]:
        """How what `predict` measures changes with the release's tensors."""
        return implicit.slopes_of_texts(job, *self._halves(job), objective, progress)

    def _halves(self, job: EvaluateJob) -> tuple[probe.Columns, probe.Columns]:
        limit = self.config.evaluate.max_examples
        found = data.classification(self.config.data, (), job.cache)
        train = data.subset(found.train, limit, 0)
        validation = data.draw(found.validation, limit, 0)
        return _columns(train), _columns(validation)


def _columns(
    examples: Sequence[data.Example[int]],
) -> tuple[list[str], list[str | None], list[int]]:
    return (
        [str(example.text) for example in examples],
        [example.pair for example in examples],
        [example.label for example in examples],
    )


def create(config: TrainConfig) -> SequenceClassification:
    """The trainer for `sequence-classification`."""
    return SequenceClassification(config)
