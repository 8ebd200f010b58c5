"""Slopes of our loss along what candidates differ by: inner products, and no tensor leaves.

The gradient is computed at home; of it a round that learns coefficients hears one number for each
atom, or for each atom and layer. See `coldmerge.rounds.slopes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import LARGEST_SLOPE
from coldmerge.core.dtypes import FLOATS, Floats32, Floats64, blocks
from coldmerge.core.errors import ConfigError, DataError
from coldmerge.core.progress import Progress, silent
from coldmerge.rounds.coefficients import group_of
from coldmerge.rounds.slopes import rounded
from coldmerge_client.papers import Body
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import EvaluateJob, load_trainer, sloping


@dataclass(frozen=True)
class Directions:
    """Candidates on disk: slopes are told along each of `ends`, seen from `start`."""

    start: Path
    ends: tuple[Path, ...]


def along(
    config: TrainConfig,
    here: Body,
    directions: Directions,
    seed: int,
    cache: Path,
    progress: Progress = silent,
    *,
    objective: str,
    by_layer: bool,
) -> dict[str, tuple[float, ...]]:
    """How the objective at `here` changes along the directions: by layer, or under "" in all.

    `seed` is that of the probe, as for `coldmerge_client.papers.compare`.

    Raises:
        ConfigError: the trainer has no slopes, or not of these tensors.
        DataError: the validation data cannot be used, or a slope is no number.
    """
    trainer = sloping(load_trainer(config), config)
    job = EvaluateJob(here.folder, config, seed, cache, here.digest)
    gradient = trainer.gradient(job, objective, progress)
    found = inner_products(gradient, directions, config)
    if not by_layer:
        whole = np.sum(list(found.values()), axis=0) if found else np.zeros(len(directions.ends))
        found = {"": whole}
    return {group: tuple(_number(each) for each in told) for group, told in sorted(found.items())}


def inner_products(
    gradient: Mapping[str, Floats32], directions: Directions, config: TrainConfig
) -> dict[str, Floats64]:
    """<gradient, end - start> for each direction, float64 [directions], by layer.

    Layers in which no direction goes anywhere are left out.

    Raises:
        ConfigError: the gradient is of other tensors.
    """
    start, ends = Checkpoint.open(directions.start), [Checkpoint.open(e) for e in directions.ends]
    found: dict[str, Floats64] = defaultdict(lambda: np.zeros(len(ends)))
    moved = set()
    for name, slope in sorted(gradient.items()):
        spec = start.tensors.get(name)
        if spec is None or spec.dtype not in FLOATS or spec.shape != slope.shape:
            raise _other_tensors(name, config)
        flat = np.ascontiguousarray(slope, np.float32).reshape(-1)
        for first, stop in blocks(flat.size):
            origin = start.block(name, first, stop)
            for place, end in enumerate(ends):
                difference = np.subtract(end.block(name, first, stop), origin, dtype=np.float64)
                if difference.any():
                    moved.add(group_of(name))
                    found[group_of(name)][place] += difference @ flat[first:stop].astype(np.float64)
    return {group: found[group] for group in sorted(moved)}


def _other_tensors(name: str, config: TrainConfig) -> ConfigError:
    return ConfigError(
        "training.other_tensors",
        f"The trainer {config.trainer} gives slopes of {name}, which is no such tensor of the "
        "release.",
        expected="the release's tensors by name, each in its shape",
        got=name,
        hint="See coldmerge_client.training.Slopes; our numbers count without them.",
    )


def _number(slope: float) -> float:
    if not abs(slope) <= LARGEST_SLOPE:  # also for what is no number
        raise DataError(
            "training.bad_slope",
            "A slope that the round asks for is no number that can be sent.",
            expected=f"at most {LARGEST_SLOPE:g} either way",
            got=slope,
            hint="Look at the trainer, and at the release: its loss may not be finite.",
        )
    return rounded(float(slope))
