"""Continue texts: AutoModelForCausalLM. There is no private head: all of it is the release's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from coldmerge.core.progress import Progress, silent
from coldmerge_client.training import batches, data, models
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.huggingface import HuggingFaceTrainer, Prepared, predict_labels
from coldmerge_client.training.trainer import EvaluateJob, Predictions, TrainJob


class CausalLM(HuggingFaceTrainer):
    """Next-token prediction on texts."""

    task = "causal-lm"
    auto = transformers.AutoModelForCausalLM
    shift = 1

    def prepare(self, job: TrainJob, tokenizer: Any, scratch: Path) -> Prepared:
        """Texts to ids, each ended by the end-of-text token where it fits."""
        found = data.texts(self.config.data, scratch)
        train = data.draw(found.train, self.config.max_examples, job.seed)
        return Prepared(
            self._encoded(tokenizer, train),
            self._encoded(tokenizer, found.validation),
            dropped=found.dropped,
            drawn=len(train) < len(found.train),
        )

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """The release's own most likely next tokens, against those of the validation texts."""
        limits = self.config.evaluate
        found = data.texts(self.config.data, job.cache)
        with models.threads(self.config):
            tokenizer = models.load_tokenizer(job.release)
            drawn = data.draw(found.validation, limits.max_examples, 0)
            examples = self._encoded(tokenizer, drawn)
            model = models.load(self.auto, job.release, dtype=torch.float32)
            progress("predict", 0, 1)
            predicted = predict_labels(
                model,
                examples,
                batches.Collator(tokenizer),
                self.config,
                limits.max_tokens,
                self.shift,
            )
        progress("predict", 1, 1)
        return predicted

    def _encoded(
        self, tokenizer: Any, examples: Sequence[data.Example[None]]
    ) -> list[batches.Features]:
        end = tokenizer.eos_token_id
        room = self.config.max_length - (end is not None)
        found = []
        for feature in batches.tokenize(
            tokenizer, [e.text for e in examples], [None] * len(examples), room
        ):
            ids = list(feature["input_ids"])
            if end is not None and ids[-1:] != [end] and len(ids) < room:
                ids.append(end)
            found.append({"attention_mask": [1] * len(ids), "input_ids": ids, "labels": list(ids)})
        return found


def create(config: TrainConfig) -> CausalLM:
    """The trainer for `causal-lm`."""
    return CausalLM(config)
