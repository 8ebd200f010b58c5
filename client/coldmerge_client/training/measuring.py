"""Statistics of private data through the tuned model, for merge methods that ask for them.

Fisher: E[g²] of the log-likelihood, example by example (Matena & Raffel, arXiv 2111.09832).
Gram: XᵀX of each linear layer's inputs, over tokens that are not padding (Jin et al.,
arXiv 2212.09849). Both stay in the home folder until the owner lets them leave.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.documents import Statistic
from coldmerge.core.errors import DataError
from coldmerge.core.progress import Progress
from coldmerge.core.statistics import COUNTS, DTYPE
from coldmerge.core.vector_writer import Planned
from coldmerge_client.training import batches, models
from coldmerge_client.training.batches import IGNORED, Collator, Features
from coldmerge_client.training.config import TrainConfig

MOST_EXAMPLES = 1000
FLOOR = 1e-8
MOST_LABELS = 16
ROOM = 2**30
"""Bytes of sums that are held at once: more passes over the data where a model needs more."""


@dataclass(frozen=True)
class Subject:
    """A tuned model, and what to measure it with.

    `weights`: its parameters' names → names of the release tensors that may be shipped.
    `shift`: how many places the labels run ahead of the outputs.
    """

    model: Any
    weights: Mapping[str, str]
    examples: Sequence[Features]
    collate: Collator
    config: TrainConfig
    shift: int


@dataclass(frozen=True)
class _Sum:
    """A statistic to measure: its key, and the parameter it is of."""

    key: str
    parameter: str
    shape: tuple[int, ...]


def measure(subject: Subject, kinds: Collection[Statistic], out: Path, progress: Progress) -> None:
    """Measure `kinds` and write the folder that `core.statistics.Measured` opens.

    Raises:
        DataError: a statistic is not finite.
    """
    subject.model.to(models.device(subject.config)).eval().requires_grad_(False)
    examples = spread(subject.examples)
    tokens = sum(sum(example["attention_mask"]) for example in examples)
    counts = {"fisher": float(len(examples)), "gram": float(tokens)}
    ways = {"fisher": _fisher, "gram": _gram}
    sums = {kind: list(_sums(subject, kind)) for kind in sorted(kinds)}
    work = [(ways[kind], group) for kind, found in sums.items() for group in _groups(found)]
    shutil.rmtree(out, ignore_errors=True)
    with CheckpointWriter(out) as writer:
        writer.declare([Planned(s.key, DTYPE, s.shape) for found in sums.values() for s in found])
        for number, (way, group) in enumerate(work):
            progress("measure", number, len(work))
            for one, value in zip(group, way(subject, group, examples), strict=True):
                _check_finite(one, value)
                writer.write(one.key, value.cpu().numpy())
        writer.write_file(COUNTS, json.dumps({kind: counts[kind] for kind in sums}).encode())
    progress("measure", len(work), len(work))


def spread(examples: Sequence[Features]) -> list[Features]:
    """At most `MOST_EXAMPLES`, evenly from all."""
    count = min(len(examples), MOST_EXAMPLES)
    return [examples[place * len(examples) // count] for place in range(count)]


def _sums(subject: Subject, kind: Statistic) -> Iterator[_Sum]:
    linear = _linear(subject.model)
    for name, parameter in subject.model.named_parameters():
        if name in subject.weights and (kind == "fisher" or name in linear):
            shape = tuple(parameter.shape)
            side = (linear[name].in_features,) * 2 if kind == "gram" else shape
            yield _Sum(f"{subject.weights[name]}.{kind}", name, side)


def _linear(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear layers, by the name of their weight."""
    found = model.named_modules()
    return {f"{name}.weight": part for name, part in found if isinstance(part, torch.nn.Linear)}


def _groups(sums: Sequence[_Sum]) -> Iterator[list[_Sum]]:
    """In order, as many together as there is room for."""
    group: list[_Sum] = []
    room = ROOM
    for one in sums:
        room -= 4 * prod(one.shape)
        if group and room < 0:
            yield group
            group, room = [], ROOM - 4 * prod(one.shape)
        group.append(one)
    if group:
        yield group


def _fisher(
    subject: Subject, group: Sequence[_Sum], examples: Sequence[Features]
) -> list[torch.Tensor]:
    """The mean squared gradient of each parameter of `group`, at least `FLOOR`."""
    known = dict(subject.model.named_parameters())
    chosen = [known[one.parameter].requires_grad_(True) for one in group]
    totals = [torch.zeros_like(parameter) for parameter in chosen]
    for example in examples:
        batch = _on_device(subject, subject.collate([example]))
        labels = batch.pop("labels")
        logits = subject.model(**batch).logits
        for share, value in log_likelihoods(logits, labels, subject.shift):
            found = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=share)
    for parameter in chosen:
        parameter.requires_grad_(False)
    return [(total / len(examples)).clamp_(min=FLOOR) for total in totals]


def log_likelihoods(
    logits: torch.Tensor, labels: torch.Tensor, shift: int
) -> Iterator[tuple[float, torch.Tensor]]:
    """(share, log-likelihood) pairs of one example, whose squared gradients are added.

    With one label per text each label counts by the probability that the model gives it, as
    in the paper (the likeliest few). Of a sequence the labels as they are: its
    log-likelihood is the sum over its tokens.
    """
    scores = torch.log_softmax(logits[0].float(), -1)
    if labels.ndim == 1:
        for label in scores.topk(min(MOST_LABELS, len(scores))).indices:
            yield float(scores[label].detach().exp()), scores[label]
        return
    wanted = labels[0]
    if shift:
        scores, wanted = scores[:-shift], wanted[shift:]
    counted = wanted != IGNORED
    yield 1.0, scores[counted].gather(-1, wanted[counted].unsqueeze(-1)).sum()


def _gram(
    subject: Subject, group: Sequence[_Sum], examples: Sequence[Features]
) -> list[torch.Tensor]:
    """XᵀX of the inputs of each linear layer of `group`, exactly symmetric."""
    where, linear = models.device(subject.config), _linear(subject.model)
    totals = [torch.zeros(one.shape, device=where) for one in group]
    real = torch.ones(0, dtype=torch.bool)

    def add(total: torch.Tensor, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = (args[0] if args else kwargs["input"]).reshape(-1, len(total)).float()
        rows = rows[real] if len(rows) == len(real) else rows
        total.addmm_(rows.T, rows)

    with torch.no_grad(), ExitStack() as hooks:
        for one, total in zip(group, totals, strict=True):
            layer = linear[one.parameter]
            handle = layer.register_forward_pre_hook(partial(add, total), with_kwargs=True)
            hooks.callback(handle.remove)
        for places in batches.by_length(examples, subject.config.batch_size):
            batch = _on_device(subject, subject.collate([examples[place] for place in places]))
            real = batch["attention_mask"].reshape(-1).bool()
            batch.pop("labels")
            subject.model(**batch)
    return [(total + total.T) / 2 for total in totals]


def _on_device(subject: Subject, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    where = models.device(subject.config)
    return {name: part.to(where) for name, part in batch.items()}


def _check_finite(one: _Sum, value: torch.Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise DataError(
            "training.statistic_not_finite",
            f"The statistic {one.key} holds NaN or Inf.",
            expected="finite numbers",
            hint="The training diverged: lower `lr` in the training configuration.",
        )
