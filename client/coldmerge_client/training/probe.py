"""A linear probe on frozen features: the same yardstick for base and candidate.

Features are the body's last hidden states, averaged over the words of a text (or those of
each word's first piece). The probe is refitted on each release, so that no release is
favoured by a head that grew up with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from coldmerge.core.errors import DataError
from coldmerge.core.progress import Progress, silent
from coldmerge_client.training import batches, models, trunk
from coldmerge_client.training.batches import Features
from coldmerge_client.training.trainer import EvaluateJob, Predictions

Floats = NDArray[np.float32]

STRENGTH = 0.1
"""Inverse regularization, for features scaled to variance 1 over all dimensions together.

One scale, not one per dimension: on nine small sets of text and 100 to 400 examples each
that was as good as the best alternative (79.2 and 86.3 % against 78.6 and 85.6), and it
does not depend on how large a release's features happen to be.
"""

MAX_ITERATIONS = 1000

UNHEARD = 1e-6
"""The least chance that a label counts as having had: one that training never saw has none."""


def linear_probe(
    features_train: Floats,
    labels_train: NDArray[np.integer[Any]],
    features_test: Floats,
    labels_test: NDArray[np.integer[Any]],
    seed: int,
) -> NDArray[np.int64]:
    """Fit a logistic regression on the train half, predict the test half: int64 [n_test].

    Raises:
        DataError: rows and labels differ in number, or the labels are all the same.
    """
    return fitted_probe(features_train, labels_train, features_test, labels_test, seed).predicted


def fitted_probe(
    features_train: Floats,
    labels_train: NDArray[np.integer[Any]],
    features_test: Floats,
    labels_test: NDArray[np.integer[Any]],
    seed: int,
) -> Predictions:
    """The same with the probe's loss and entropy. Features are float32 [n, hidden].

    Raises:
        DataError: rows and labels differ in number, or the labels are all the same.
    """
    probe, mean, scale = fit(features_train, labels_train, features_test, labels_test, seed)
    with _pools().limit(limits=1):
        tested = (features_test - mean) / scale
        predicted, chances = probe.predict(tested), probe.predict_proba(tested)
    loss, entropy = _means(probe.classes_, chances, labels_test)
    right, found = labels_test.astype(np.int64), predicted.astype(np.int64)
    return Predictions(right, found, loss, entropy)


def fit(
    features_train: Floats,
    labels_train: NDArray[np.integer[Any]],
    features_test: Floats,
    labels_test: NDArray[np.integer[Any]],
    seed: int,
) -> tuple[Any, NDArray[np.float64], float]:
    """The probe, and the mean [hidden] and scale that it takes features by.

    Raises:
        DataError: rows and labels differ in number, or the labels are all the same.
    """
    from sklearn.linear_model import LogisticRegression

    for features, labels in ((features_train, labels_train), (features_test, labels_test)):
        if len(features) != len(labels) or len(features) == 0:
            raise DataError(
                "probe.unpaired",
                "The probe needs one label per row of features.",
                expected=f"{len(features)} labels, at least one",
                got=f"{len(labels)} labels",
                hint="Check how the examples were selected.",
            )
    if len(np.unique(labels_train)) < 2:
        raise DataError(
            "probe.one_class",
            "The probe's training examples all have the same label.",
            hint="Raise `evaluate.max_examples`, or add examples of other labels.",
        )
    mean = features_train.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(features_train.var(dtype=np.float64))) or 1.0
    probe = LogisticRegression(C=STRENGTH, max_iter=MAX_ITERATIONS, random_state=seed)
    with _pools().limit(limits=1):  # BLAS threads that spin make this many times slower
        probe.fit((features_train - mean) / scale, labels_train)
    return probe, mean, scale


def _means(
    classes: NDArray[np.integer[Any]], chances: NDArray[Any], labels: NDArray[np.integer[Any]]
) -> tuple[float, float]:
    """Mean loss and entropy of the chances of each class, float [n, classes]; in nats."""
    chances = np.asarray(chances, np.float64)
    place = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    right = np.where(classes[place] == labels, chances[np.arange(len(labels)), place], 0.0)
    spread = -(chances * np.log(np.maximum(chances, UNHEARD))).sum(1)
    loss = float(-np.log(np.maximum(right, UNHEARD)).mean())
    return max(0.0, loss), max(0.0, float(spread.mean()))


@cache
def _pools() -> ThreadpoolController:
    """The BLAS libraries, once sklearn has loaded them: looking takes as long as a small probe."""
    return ThreadpoolController()


def embed(
    model_folder: Path,
    texts: Sequence[str],
    max_length: int = 128,
    batch_size: int = 64,
    *,
    pairs: Sequence[str | None] | None = None,
    freeze: Sequence[str] = (),
    cache: Path | None = None,
    device: torch.device | None = None,
    bf16: bool = False,
) -> Floats:
    """Mean-pooled features of texts: float32 [n, hidden]; `bf16` computes them in bfloat16.

    With `cache` (a folder) what the layers below `freeze` compute is kept there, and not
    computed again for another release whose frozen layers are the same.

    Raises:
        CheckpointError: the folder cannot be loaded.
    """
    encoder = Encoder(model_folder, max_length, batch_size, device, bf16)
    examples = encoder.tokenize(texts, pairs or [None] * len(texts))
    return encoder.pooled(examples, freeze, cache)


@dataclass
class Encoder:
    """A release's body and tokenizer, ready to compute features."""

    folder: Path
    max_length: int
    batch_size: int = 64
    device: torch.device | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        self.tokenizer = models.load_tokenizer(self.folder)
        body = models.load(transformers.AutoModel, self.folder, dtype=torch.float32)
        if body.config.is_encoder_decoder:
            body = body.get_encoder()
        self.body = body.to(self.device or torch.device("cpu")).eval()
        self._collate = batches.Collator(self.tokenizer)

    def tokenize(self, texts: Sequence[Any], pairs: Sequence[str | None]) -> list[Features]:
        """Sentences, or tuples of words."""
        return batches.tokenize(self.tokenizer, texts, pairs, self.max_length)

    def pooled(
        self, examples: Sequence[Features], freeze: Sequence[str] = (), cache: Path | None = None
    ) -> Floats:
        """Mean over the tokens of each example: float32 [n, hidden]."""
        found = np.zeros((len(examples), self.body.config.hidden_size), np.float32)

        def mean(position: int, states: torch.Tensor) -> None:
            found[position] = states.mean(0).numpy()

        self._each(examples, mean, freeze, cache)
        return found

    def pulled(self, examples: Sequence[Features], pulls: Floats) -> dict[str, Floats]:
        """The gradient of Σ pulls · pooled features, by the release's names of tensors.

        `pulls` is float32 [n, hidden], a row for each example. One pass back, a batch at a time,
        added up in float32; parameters that the release does not have are left out.
        """
        for group in batches.by_length(examples, self.batch_size):
            states = self._states(self._collate([examples[position] for position in group]))
            lengths = [len(examples[position]["attention_mask"]) for position in group]
            means = [states[row, :length].float().mean(0) for row, length in enumerate(lengths)]
            towards = torch.from_numpy(pulls[group]).to(states.device)
            (torch.stack(means) * towards).sum().backward()
        names = models.Names(self.body, self.folder)
        return {
            known: names.parameters[name].grad.float().cpu().numpy()
            for name, known in names.canonical.items()
            if known is not None and names.parameters[name].grad is not None
        }

    def pieces(self, examples: Sequence[Features], places: Sequence[Sequence[int]]) -> list[Floats]:
        """The states at the given places of each example: float32 [places, hidden] each."""
        found: list[Floats] = [np.zeros((0, 0), np.float32)] * len(examples)

        def pick(position: int, states: torch.Tensor) -> None:
            found[position] = states[list(places[position])].numpy()

        self._each(examples, pick, (), None)
        return found

    def _each(
        self, examples: Sequence[Features], take: Any, freeze: Sequence[str], cache: Path | None
    ) -> None:
        """Call `take(position, states [length, hidden])` for each example."""
        cut = self._cut(examples, freeze, cache) if freeze and cache else None
        fed = cut.examples if cut else examples
        try:
            with torch.inference_mode():
                for group in batches.by_length(fed, self.batch_size):
                    batch = self._collate([fed[position] for position in group])
                    states = self._states(batch).float().cpu()
                    for row, position in enumerate(group):
                        take(position, states[row, : len(fed[position]["attention_mask"])])
        finally:
            if cut:
                cut.restore()

    def _states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        where = self.body.device
        with torch.autocast(where.type, torch.bfloat16, self.bf16):
            found = self.body(**{name: part.to(where) for name, part in batch.items()})
        states: torch.Tensor = found.last_hidden_state
        return states

    def _cut(
        self, examples: Sequence[Features], freeze: Sequence[str], cache: Path | None
    ) -> trunk.Cut | None:
        names = models.Names(self.body, self.folder)
        for name in names.frozen(freeze):
            names.parameters[name].requires_grad_(False)
        return trunk.cut(self.body, examples, self._collate, cache)


def cached(job: EvaluateJob, what: object, compute: Any) -> dict[str, torch.Tensor]:
    """The tensors of `compute()`, from the job's cache when they were computed before.

    The base of one round was the candidate of the last: its features are there already.
    """
    if job.cache is None or job.digest is None:
        found: dict[str, torch.Tensor] = compute()
        return found
    key = hashlib.sha256(json.dumps([job.digest, what]).encode()).hexdigest()
    path = job.cache / f"features-{key}.safetensors"
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError):
        found = compute()
        trunk.store(path, found)
        return found


Columns = tuple[Sequence[str], Sequence[str | None], Sequence[int]]
"""Texts, pairs, labels."""


def probe_texts(
    job: EvaluateJob, train: Columns, validation: Columns, progress: Progress = silent
) -> Predictions:
    """Predictions for the validation part (texts, pairs, labels)."""
    progress("probe", 0, 2)
    with models.threads(job.config):
        features = text_features(job, train, validation)
        progress("probe", 1, 2)
        here = len(train[0])
        predicted = fitted_probe(
            features[:here],
            np.asarray(train[2]),
            features[here:],
            np.asarray(validation[2]),
            job.seed,
        )
    progress("probe", 2, 2)
    return predicted


def text_features(job: EvaluateJob, train: Columns, validation: Columns) -> Floats:
    """Of the texts of both parts, one after the other: float32 [n, hidden]."""
    texts, pairs = [*train[0], *validation[0]], [*train[1], *validation[1]]
    config, where = job.config, models.device(job.config)
    bf16 = models.use_bf16(config, where)

    def compute() -> dict[str, torch.Tensor]:
        found = embed(
            job.release,
            texts,
            config.max_length,
            pairs=pairs,
            freeze=config.freeze,
            cache=job.cache,
            device=where,
            bf16=bf16,
        )
        return {"features": torch.from_numpy(found)}

    found: Floats = cached(job, [texts, pairs, config.max_length, bf16], compute)[
        "features"
    ].numpy()
    return found
