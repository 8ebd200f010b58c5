"""How the loss of a fitted probe changes with the features that it is fitted and tried on.

A probe is the minimum W of its own objective G(W, X) on the training half X, and V(W, T) is what
it comes to on the other half T. When features move, W moves with them: by the implicit function
theorem dV/dX = -λ ∂²G/∂W∂X with λ from (∂²G/∂W²) λ = ∂V/∂W, which conjugate gradients solve.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from coldmerge.core.progress import Progress, silent
from coldmerge_client.training import models, probe
from coldmerge_client.training.trainer import EvaluateJob

Floats64 = NDArray[np.float64]

TOLERANCE = 1e-10
"""What may be left of λ's equation, of what there was."""

MOST_STEPS = 2000


def pulls(
    features_train: NDArray[np.float32],
    labels_train: NDArray[np.integer[Any]],
    features_test: NDArray[np.float32],
    labels_test: NDArray[np.integer[Any]],
    seed: int,
    objective: str,
) -> tuple[Floats64, Floats64]:
    """The gradient of the probe's `loss` or `entropy` with respect to both parts of the features.

    Labels are int [n], features float32 [n, hidden] as `probe.fitted_probe` takes them; what
    returns has their shapes, in float64.

    Raises:
        DataError: rows and labels differ in number, or the labels are all the same.
    """
    fitted = probe.fit(features_train, labels_train, features_test, labels_test, seed)[0]
    train, test = (
        torch.from_numpy(each.astype(np.float64)).requires_grad_()
        for each in (features_train, features_test)
    )
    mean, spread = train.mean(0), train.var(correction=0)
    scale = spread.sqrt() if float(spread.detach()) else torch.ones((), dtype=torch.float64)
    weights = [
        torch.from_numpy(np.ascontiguousarray(part, np.float64)).requires_grad_()
        for part in (fitted.coef_, fitted.intercept_)
    ]
    value = _value(_scores(weights, (test - mean) / scale), fitted.classes_, labels_test, objective)
    places = torch.from_numpy(np.searchsorted(fitted.classes_, labels_train))
    scores = _scores(weights, (train - mean) / scale)
    inner = probe.STRENGTH * functional.cross_entropy(scores, places, reduction="sum")
    inner = inner + weights[0].square().sum() / 2
    slopes = torch.autograd.grad(inner, weights, create_graph=True)
    wanted = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)

    def curved(direction: torch.Tensor) -> torch.Tensor:
        along = torch.autograd.grad(slopes, weights, _like(weights, direction), retain_graph=True)
        return _flat(along)

    multiplier = _solved(curved, _flat(wanted))
    towards = sum((s * d).sum() for s, d in zip(slopes, _like(weights, multiplier), strict=True))
    found = torch.autograd.grad(value - towards, (train, test))
    return found[0].numpy(), found[1].numpy()


def slopes_of_texts(
    job: EvaluateJob,
    train: probe.Columns,
    validation: probe.Columns,
    objective: str,
    progress: Progress = silent,
) -> dict[str, probe.Floats]:
    """How the probe's loss, or its entropy, changes with the tensors of the release, by name.

    The probe is refitted wherever the release goes, and that is part of it. Nothing is frozen and
    nothing dropped out; in bfloat16 where the probe's features are.
    """
    config, here = job.config, len(train[0])
    progress("slopes", 0, 2)
    with models.threads(config):
        features = probe.text_features(job, train, validation)
        labels = np.asarray(train[2]), np.asarray(validation[2])
        parts = (features[:here], labels[0], features[here:], labels[1])
        towards = np.concatenate(pulls(*parts, job.seed, objective))
        progress("slopes", 1, 2)
        where = models.device(config)
        encoder = probe.Encoder(
            job.release,
            config.max_length,
            config.batch_size,
            device=where,
            bf16=models.use_bf16(config, where),
        )
        texts, pairs = [*train[0], *validation[0]], [*train[1], *validation[1]]
        found = encoder.pulled(encoder.tokenize(texts, pairs), towards.astype(np.float32))
    progress("slopes", 2, 2)
    return found


def _scores(weights: list[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """Of each class, [n, classes]; of two, the probe has weights for the second one alone."""
    scores = features @ weights[0].T + weights[1]
    return functional.pad(scores, (1, 0)) if scores.shape[1] == 1 else scores


def _value(
    scores: torch.Tensor,
    classes: NDArray[np.integer[Any]],
    labels: NDArray[np.integer[Any]],
    objective: str,
) -> torch.Tensor:
    """As the probe measures it: a chance counts as one in a million at least."""
    logs, least = functional.log_softmax(scores, 1), math.log(probe.UNHEARD)
    bounded = logs.clamp(min=least)
    if objective == "entropy":
        return -(logs.exp() * bounded).sum(1).mean()
    place = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    right = bounded[torch.arange(len(labels)), torch.from_numpy(place)]
    known = torch.from_numpy(classes[place] == labels)
    return -torch.where(known, right, torch.full_like(right, least)).mean()


def _flat(parts: Any) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _like(weights: list[torch.Tensor], flat: torch.Tensor) -> list[torch.Tensor]:
    cuts = torch.split(flat, [each.numel() for each in weights])
    return [part.reshape(each.shape) for part, each in zip(cuts, weights, strict=True)]


def _solved(curved: Any, wanted: torch.Tensor) -> torch.Tensor:
    """λ with curved(λ) = wanted, by conjugate gradients."""
    found, left = torch.zeros_like(wanted), wanted.clone()
    along, before = left.clone(), float(left @ left)
    enough = before * TOLERANCE**2
    for _ in range(MOST_STEPS):
        if before <= enough:
            break
        bent = curved(along)
        length = before / float(along @ bent)
        found, left = found + length * along, left - length * bent
        now = float(left @ left)
        along, before = left + now / before * along, now
    return found
