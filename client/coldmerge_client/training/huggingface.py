"""What the trainers on transformers share: load, freeze, wrap, fit, save, keep the head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from coldmerge.core.documents import Statistic
from coldmerge.core.progress import Progress, silent
from coldmerge.core.statistics import FOLDER
from coldmerge.evaluation import scores
from coldmerge_client.training import heads, lora, measuring, models, trunk
from coldmerge_client.training.batches import IGNORED, Collator, Features
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.fit import fit
from coldmerge_client.training.trainer import EvaluateJob, Predictions, Trained, TrainJob
from coldmerge_client.training.workspace import Workspace

Head = dict[str, torch.Tensor]
"""The parameters that stay at home, by name."""


@dataclass(frozen=True)
class Prepared:
    """Tokenized examples and the vocabulary of their labels.

    `drawn` says that `train` is a sample: another round draws another one.
    """

    train: list[Features]
    validation: list[Features]
    labels: tuple[str, ...] = ()
    dropped: int = 0
    drawn: bool = False


class HuggingFaceTrainer(ABC):
    """A trainer for one auto class. Subclasses say how data becomes features.

    `task` says what a kept head is for; `shift` is how many places the labels run ahead of
    the outputs.
    """

    task: str
    auto: ClassVar[Any]
    shift: ClassVar[int] = 0

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, job: TrainJob, tokenizer: Any, scratch: Path) -> Prepared:
        """Read the private data and tokenize it."""

    @abstractmethod
    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """See `Trainer`."""

    def load(self, job: TrainJob, labels: Sequence[str], settings: dict[str, Any]) -> Any:
        """The model with a fresh head for `labels`."""
        if labels:
            settings = {**settings, **label_settings(labels)}
        return models.load(self.auto, job.release, **settings)

    def train(self, job: TrainJob, progress: Progress = silent) -> Trained:
        """See `Trainer`.

        Raises:
            DataError: the data cannot be used.
            ConfigError: a setting does not fit the model, or `out` is not empty.
            CheckpointError: the release cannot be loaded.
        """
        space = Workspace(job)
        done = space.result()
        if done is not None:
            return done
        with models.threads(self.config):
            tokenizer = models.load_tokenizer(job.release)
            data = self.prepare(job, tokenizer, space.scratch)
            transformers.set_seed(job.seed)
            model, head = self._model(job, data.labels, tokenizer)
            metrics = self._fit(job, space, model, head, data, Collator(tokenizer), progress)
            return self._save(space, model, tokenizer, head, data, metrics)

    def measure(
        self,
        job: TrainJob,
        trained: Trained,
        kinds: Collection[Statistic],
        progress: Progress = silent,
    ) -> None:
        """See `Measures`."""
        folder = trained.folder
        with models.threads(self.config), TemporaryDirectory(dir=folder.parent) as scratch:
            tokenizer = models.load_tokenizer(job.release)
            data = self.prepare(replace(job, head=trained.head), tokenizer, Path(scratch))
            model, weights = self._tuned(job, trained, data.labels)
            if model.config.pad_token_id is None:
                model.config.pad_token_id = tokenizer.pad_token_id
            subject = measuring.Subject(
                model, weights, data.train, Collator(tokenizer), self.config, self.shift
            )
            measuring.measure(subject, kinds, folder / FOLDER, progress)

    def _tuned(
        self, job: TrainJob, trained: Trained, labels: Sequence[str]
    ) -> tuple[Any, dict[str, str]]:
        """The tuned model, adapters merged, and the names of what is shipped of it."""
        settings = {"dtype": torch.float32}
        is_lora = self.config.method == "lora"
        if is_lora:
            model = lora.merged(self.load(job, labels, settings), trained.folder)
        else:
            model = self.load(replace(job, release=trained.folder), labels, settings)
        names = models.Names(model, job.release, job.private)
        kept = heads.kept(trained.head, self.task)
        if kept is not None:
            kept.fill(names.parameters, labels)
        stays = {*names.head(), *names.frozen(self.config.freeze)}
        targets = lora.targets(trained.folder) if is_lora else set(names.parameters)
        return model, {
            name: known
            for name, known in names.canonical.items()
            if known is not None and name in targets and name not in stays
        }

    def _model(self, job: TrainJob, labels: Sequence[str], tokenizer: Any) -> tuple[Any, Head]:
        """The model, ready to train, and its head."""
        config = self.config
        dtype = lora.base_dtype(job.release) if config.method == "lora" else torch.float32
        model = self.load(job, labels, {"dtype": dtype})
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        names = models.Names(model, job.release, job.private)
        head = names.head()
        kept = heads.kept(job.head, self.task)
        if kept is not None:
            kept.fill(names.parameters, labels)
        models.freeze(model, names, config.freeze)
        if config.method == "lora":
            model = lora.wrap(model, config, names, head)
        return model, lora.trained_copies(model, head)

    def _fit(
        self,
        job: TrainJob,
        space: Workspace,
        model: Any,
        head: Head,
        data: Prepared,
        collate: Collator,
        progress: Progress,
    ) -> dict[str, float]:
        """Train in place; steps, loss and the scores with the model's own head."""
        limits = self.config.evaluate
        validation = data.validation[: limits.max_examples] if limits.after_training else []
        passing = len(data.train) if data.drawn else 0
        with self._short(job, model, [*data.train, *validation], collate, passing) as examples:
            metrics = fit(
                model,
                examples[: len(data.train)],
                collate,
                list(head.values()),
                self.config,
                job.seed,
                space.checkpoints,
                progress,
            )
            if validation:
                predicted = predict_labels(
                    model,
                    examples[len(data.train) :],
                    collate,
                    self.config,
                    limits.max_tokens,
                    self.shift,
                )
                found = scores(predicted.labels, predicted.predicted)
                metrics |= {"val_accuracy": found.accuracy, "val_macro_f1": found.macro_f1}
        return metrics

    @contextmanager
    def _short(
        self,
        job: TrainJob,
        model: Any,
        examples: Sequence[Features],
        collate: Collator,
        passing: int,
    ) -> Iterator[Sequence[Features]]:
        """The examples, past the frozen bottom of the model where it can be cut off.

        The first `passing` of them are of this round only.
        """
        inner = model.get_base_model() if self.config.method == "lora" else model
        body = getattr(inner, "base_model", None)
        cut = None
        if self.config.freeze and body is not None:
            body = body.to(models.device(self.config))
            cut = trunk.cut(body, examples, collate, job.cache, passing)
        try:
            yield cut.examples if cut else examples
        finally:
            if cut:
                cut.restore()

    def _save(
        self,
        space: Workspace,
        model: Any,
        tokenizer: Any,
        head: Head,
        data: Prepared,
        metrics: dict[str, float],
    ) -> Trained:
        def save_model(folder: Path) -> None:
            with models.quiet():
                model.save_pretrained(str(folder))
                tokenizer.save_pretrained(str(folder))

        folder = space.write("model", save_model)
        kept = None
        if head:
            tensors = {name: parameter.detach() for name, parameter in head.items()}
            kept = space.write("head", heads.Head(self.task, data.labels, tensors).save)
        training = {
            "batch_size": float(self.config.batch_size * self.config.accumulate),
            "dropped_rows": float(data.dropped),
            "epochs": self.config.epochs,
            "learning_rate": self.config.lr,
            "steps": metrics.pop("steps"),
        }
        return space.finish(Trained(folder, kept, len(data.train), metrics, training))


def label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """What `from_pretrained` needs for a head with these labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: position for position, label in enumerate(labels)},
        "ignore_mismatched_sizes": True,
    }


def predict_labels(
    model: Any,
    examples: Sequence[Features],
    collate: Collator,
    config: TrainConfig,
    limit: int,
    shift: int = 0,
) -> Predictions:
    """Labels and most likely outputs, at most `limit` of them, in order."""
    where = models.device(config)
    model.to(where).eval()
    labels: list[NDArray[np.int64]] = []
    predicted: list[NDArray[np.int64]] = []
    means: list[NDArray[np.float64]] = []
    for start in range(0, len(examples), config.batch_size):
        if sum(map(len, labels)) >= limit:
            break
        batch = collate(examples[start : start + config.batch_size])
        wanted = batch.pop("labels")
        with (
            torch.inference_mode(),
            torch.autocast(where.type, torch.bfloat16, models.use_bf16(config, where)),
        ):
            logits = model(**{name: part.to(where) for name, part in batch.items()}).logits
        if shift:
            wanted, logits = wanted[:, shift:], logits[:, :-shift]
        counted = wanted != IGNORED
        labels.append(wanted[counted].numpy())
        outputs = logits[counted.to(where)].float()
        predicted.append(outputs.argmax(-1).cpu().numpy())
        means.append(_losses(outputs, wanted[counted].to(where)))
    loss, entropy = np.concatenate(means)[:limit].mean(0)
    return Predictions(
        np.concatenate(labels)[:limit],
        np.concatenate(predicted)[:limit],
        float(loss),
        max(0.0, float(entropy)),
    )


def _losses(outputs: torch.Tensor, wanted: torch.Tensor) -> NDArray[np.float64]:
    """Negative log-likelihood and entropy of each of n outputs: float64 [n, 2]."""
    chances = outputs.log_softmax(-1)
    loss = -chances.gather(-1, wanted.long().unsqueeze(-1)).squeeze(-1)
    entropy = -(chances.exp() * chances).nan_to_num().sum(-1)
    found: NDArray[np.float64] = torch.stack([loss, entropy], -1).double().cpu().numpy()
    return found
