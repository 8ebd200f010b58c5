"""Label each word of a text: AutoModelForTokenClassification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from coldmerge.core.errors import CheckpointError
from coldmerge.core.progress import Progress, silent
from coldmerge_client.training import batches, data, heads, models, probe
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.huggingface import HuggingFaceTrainer, Prepared
from coldmerge_client.training.trainer import EvaluateJob, Predictions, TrainJob

Tags = tuple[int, ...]


class TokenClassification(HuggingFaceTrainer):
    """One tag per word, learned and predicted at the word's first piece."""

    task = "token-classification"
    auto = transformers.AutoModelForTokenClassification

    def prepare(self, job: TrainJob, tokenizer: Any, scratch: Path) -> Prepared:
        """Words to pieces; the tag sits on the first piece, the others do not count."""
        known = heads.known_labels(job.head, self.task)
        found = data.tokens(self.config.data, known, scratch)
        train = data.draw(found.train, self.config.max_examples, job.seed)

        def encoded(examples: Sequence[data.Example[Tags]]) -> list[batches.Features]:
            return [
                {**feature, "labels": _spread(example.label, starts, len(feature["input_ids"]))}
                for example, (feature, starts) in zip(
                    examples, words(tokenizer, examples, self.config.max_length), strict=True
                )
            ]

        drawn = len(train) < len(found.train)
        return Prepared(
            encoded(train), encoded(found.validation), found.labels, found.dropped, drawn
        )

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """A probe on the features of words, refitted on the training data of this release."""
        limits = self.config.evaluate
        found = data.tokens(self.config.data, (), job.cache)
        train = data.draw(found.train, limits.max_examples, 0)
        validation = data.draw(found.validation, limits.max_examples, 0)
        progress("probe", 0, 2)
        with models.threads(self.config):
            features, tags, split = self._features(job, train, validation, limits.max_tokens)
            progress("probe", 1, 2)
            predicted = probe.fitted_probe(
                features[:split], tags[:split], features[split:], tags[split:], job.seed
            )
        progress("probe", 2, 2)
        return predicted

    def _features(
        self,
        job: EvaluateJob,
        train: Sequence[data.Example[Tags]],
        validation: Sequence[data.Example[Tags]],
        limit: int,
    ) -> tuple[probe.Floats, NDArray[np.int64], int]:
        """Features and tags of all words, and where the validation part begins."""

        def compute() -> dict[str, torch.Tensor]:
            encoder = probe.Encoder(
                job.release, self.config.max_length, device=models.device(self.config)
            )
            parts: dict[str, torch.Tensor] = {}
            for name, examples in (("train", train), ("validation", validation)):
                pieces = list(words(encoder.tokenizer, examples, encoder.max_length))
                starts = [list(places.values()) for _, places in pieces]
                states = encoder.pieces([feature for feature, _ in pieces], starts)
                tags = [
                    example.label[word]
                    for example, (_, places) in zip(examples, pieces, strict=True)
                    for word in places
                ]
                parts[f"{name}_features"] = torch.from_numpy(np.concatenate(states)[:limit])
                parts[f"{name}_tags"] = torch.tensor(tags, dtype=torch.int64)[:limit]
            return parts

        what = [[e.text, e.label] for e in (*train, *validation)]
        found = probe.cached(job, [what, len(train), limit, self.config.max_length], compute)
        return (
            np.concatenate([found["train_features"].numpy(), found["validation_features"].numpy()]),
            np.concatenate([found["train_tags"].numpy(), found["validation_tags"].numpy()]),
            len(found["train_tags"]),
        )


def words(
    tokenizer: Any, examples: Sequence[data.Example[Any]], max_length: int
) -> list[tuple[batches.Features, dict[int, int]]]:
    """Each example's features, and the place of the first piece of each word that fits in.

    Raises:
        CheckpointError: the release's tokenizer cannot say which piece belongs to which word.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            "training.slow_tokenizer",
            "The release's tokenizer cannot say which piece belongs to which word.",
            expected="a fast tokenizer (tokenizer.json)",
            got=type(tokenizer).__name__,
            hint="Add the model again with its tokenizer.json.",
        )
    found = []
    for example in examples:
        encoded = tokenizer(
            list(example.text), truncation=True, max_length=max_length, is_split_into_words=True
        )
        places: dict[int, int] = {}
        for place, word in enumerate(encoded.word_ids()):
            if word is not None:
                places.setdefault(word, place)
        found.append(({name: encoded[name] for name in sorted(encoded)}, places))
    return found


def _spread(tags: Tags, places: dict[int, int], length: int) -> list[int]:
    labels = [batches.IGNORED] * length
    for word, place in places.items():
        labels[place] = tags[word]
    return labels


def create(config: TrainConfig) -> TokenClassification:
    """The trainer for `token-classification`."""
    return TokenClassification(config)
