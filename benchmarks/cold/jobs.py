"""What a worker process does: one simulation, one merge, or the measuring of one release.

Workers are processes with one thread for torch each. Sets are named by their folders, and read
once in each worker.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.cold.costs import Speed
from benchmarks.cold.outcome import Group, Protocol, Run, Score
from benchmarks.cold.sets import TaskSet, read_set
from coldmerge.demo import child

Measured = tuple[Path, Group]
"""A set's folder, and whether contributors train on it."""


def start(parent: int) -> None:
    """Prepare a worker: one thread, quiet tokenizers, and an end when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(child.PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the command has ended")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A hundred examples of a hundred labels are meant.
    warnings.filterwarnings("ignore", message="The number of unique classes is greater")
    import torch

    torch.set_num_threads(1)


@cache
def _set(folder: Path) -> TaskSet:
    return read_set(folder)


def speed(model: Path, train: dict[str, Any], folders: Sequence[Path], most: int) -> Speed:
    """See `costs.calibrate`; the texts are some of every set."""
    from benchmarks.cold.costs import calibrate

    tasks = [_set(folder) for folder in folders]
    items = [task.train[row] for row in range(most) for task in tasks if row < len(task.train)]
    return calibrate(model, train, items[:most])


def gpu() -> str | None:
    """The name of the GPU, where there is one."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Merged:
    """A one-shot merge, or a contributor's own fine-tune as a model."""

    run: Run
    folder: Path


def merge(
    run: Run,
    method: str,
    parameters: dict[str, Any],
    base: Path,
    vectors: Sequence[Path],
    work: Path,
) -> Merged:
    """Merge task vectors; `run` says what they cost."""
    from benchmarks.cold import simulations

    name = f"{run.variant}-{run.task or 'all'}-{run.seed}"
    digest, folder = simulations.merge(method, parameters, base, vectors, work, name)
    return Merged(replace(run, digest=digest), folder)


def probe(
    subject: Any,
    ruler: Any,
    measured: Sequence[Measured],
    protocols: Sequence[Protocol],
    known: set[Any],
    cache_folder: Path,
) -> list[Score]:
    """Probes of a release on some sets."""
    from benchmarks.cold.measuring import Probing

    probing = Probing(subject, ruler, cache_folder)
    found: list[Score] = []
    for folder, group in measured:
        found += probing.score(_set(folder), group, protocols, known)
    return found


def tune(
    subject: Any, ruler: Any, measured: Measured, protocol: Protocol, number: int
) -> list[Score]:
    """One fine-tune of a release on a set, and what it scores."""
    from benchmarks.cold import tuning

    found = tuning.tuned(subject, ruler, _set(measured[0]), measured[1], protocol, number)
    return tuning.for_all(found, subject.seeds)
