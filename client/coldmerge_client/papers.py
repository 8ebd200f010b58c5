"""What a contributor puts its name to: manifests and evaluations, made from plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from coldmerge.core.documents import LARGEST_MEAN, Evaluation, Manifest, Mean
from coldmerge.core.errors import ConfigError, DataError
from coldmerge.core.extraction import Extraction
from coldmerge.core.progress import Progress, silent
from coldmerge.core.validation import first_problem
from coldmerge.evaluation.metrics import PairedScores, paired
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import EvaluateJob, load_trainer

_MEASURED = frozenset({"loss", "entropy"})
"""Objectives that an evaluation holds in its means."""


@dataclass(frozen=True)
class Addressed:
    """Who says something, about which round of which model, on which release."""

    federation: str
    contributor: str
    model: str
    round: str
    base_digest: str
    base_number: int


def manifest(
    addressed: Addressed,
    found: Extraction,
    *,
    examples: int,
    metrics: Mapping[str, float],
    training: Mapping[str, float],
    nonce: str,
    now: datetime,
) -> Manifest:
    """What is to be signed of an extracted task vector.

    Raises:
        DataError: a number cannot be sent.
    """
    vector = found.task_vector
    try:
        return Manifest(
            federation=addressed.federation,
            model=addressed.model,
            round=addressed.round,
            contributor=addressed.contributor,
            base_digest=addressed.base_digest,
            base_number=addressed.base_number,
            nonce=nonce,
            created_at=now,
            kind=vector.kind,
            encoding=vector.encoding,
            tensors=found.entries,
            scaling=vector.scaling,
            statistics=vector.statistics,
            examples=examples,
            norm=found.norm,
            metrics=dict(metrics),
            training=dict(training),
        )
    except ValidationError as error:
        problem = first_problem(error)
        raise DataError(
            "push.bad_numbers",
            f"The facts about training cannot be sent: {problem.text}.",
            expected="finite numbers under lower-case names, and at least one example",
            got=f"{problem.key} = {problem.got}",
            hint="Correct the trainer, or pass --examples; `metrics: false` in policy.yaml "
            "leaves the metrics at home.",
        ) from error


@dataclass(frozen=True)
class Body:
    """A release or candidate on disk, and its content digest."""

    folder: Path
    digest: str


def compare(
    config: TrainConfig,
    base: Body,
    candidate: Body,
    seed: int,
    cache: Path,
    progress: Progress = silent,
    *,
    objective: str | None = None,
) -> PairedScores:
    """Fit the same probe, seeded with `seed`, on both, and predict the validation data.

    `objective` is what a round that learns coefficients asks for beside the scores.

    Raises:
        DataError: the validation data cannot be used.
        ConfigError: the trainer does not give what is asked for.
    """
    trainer = load_trainer(config)
    before, after = (
        trainer.predict(EvaluateJob(body.folder, config, seed, cache, body.digest), progress)
        for body in (base, candidate)
    )
    found = paired(before.labels, before.predicted, after.predicted)
    if objective not in _MEASURED:
        return found
    names = get_args(Mean)
    pairs = (("base", before), ("candidate", after))
    measured = {f"{which}_{objective}": getattr(one, objective) for which, one in pairs}
    return replace(found, means={n: _number(measured[n], config) for n in names if n in measured})


def _number(value: float | None, config: TrainConfig) -> float:
    if value is None or not 0 <= value <= LARGEST_MEAN:  # also for what is no number
        raise ConfigError(
            "training.no_number",
            f"The trainer {config.trainer} does not give the number that the round asks for.",
            expected=f"`loss` and `entropy` with its predictions, from 0 to {LARGEST_MEAN:g}",
            got=value,
            hint="See coldmerge_client.training.Predictions; the round goes on without us.",
        )
    return float(value)


def evaluation(
    addressed: Addressed, candidate: str, seed: int, scores: PairedScores, now: datetime
) -> Evaluation:
    """What is to be signed of a comparison with the candidate of that content digest."""
    return Evaluation(
        federation=addressed.federation,
        model=addressed.model,
        round=addressed.round,
        contributor=addressed.contributor,
        base_digest=addressed.base_digest,
        candidate_digest=candidate,
        n=scores.n,
        base=scores.base,
        candidate=scores.candidate,
        gained=scores.gained,
        lost=scores.lost,
        means=dict(scores.means),
        slopes=dict(scores.slopes),
        probe_seed=seed,
        created_at=now,
    )
