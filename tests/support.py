"""What tests of several folders need: time that stands still, patience, ports, model folders."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.documents import Evaluation, Scores
from coldmerge.core.dtypes import NUMPY
from coldmerge.core.header import TensorSpec

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
DTYPES = {kind: name for name, kind in NUMPY.items()}

T = TypeVar("T")


class FixedClock:
    """Time stands still until a test moves it."""

    def __init__(self, time: datetime = START) -> None:
        self.time = time

    def now(self) -> datetime:
        return self.time

    def advance(self, by: timedelta) -> None:
        self.time += by


def until(
    what: str, probe: Callable[[], T | None], patience: float = 90.0, every: float = 0.02
) -> T:
    """Ask `probe` again and again until it answers; fail with `what` when patience ends."""
    deadline = time.monotonic() + patience
    pause = threading.Event()
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience:.0f} s in vain for {what}")
        pause.wait(every)
    return found


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now; a coordinator keeps them over its restarts."""
    with ExitStack() as stack:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        for found in sockets:
            stack.enter_context(found)
        return [int(found.getsockname()[1]) for found in sockets]


def write_model(folder: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A model folder with these tensors, a configuration and a tokenizer file."""
    specs = [TensorSpec(n, DTYPES[a.dtype], a.shape, 0, a.nbytes) for n, a in tensors.items()]
    with CheckpointWriter(folder) as writer:
        writer.declare(specs)
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array))
        writer.write_file("config.json", b'{"model_type": "test"}')
        writer.write_file("tokenizer.json", b"{}")
    return folder


def evaluation(
    round_: Any, contributor: str, at: datetime, points: int = 0, federation: str = "test"
) -> Evaluation:
    """`contributor` finds the candidate of a round better by `points`, on 100 items."""
    return Evaluation(
        federation=federation,
        model=round_.model,
        round=round_.id,
        contributor=contributor,
        base_digest=round_.base_digest,
        candidate_digest=round_.candidate_digest or "0" * 64,
        n=100,
        base=Scores(accuracy=0.5, macro_f1=0.5),
        candidate=Scores(accuracy=0.5 + points / 100, macro_f1=0.5),
        gained=max(points, 0),
        lost=max(-points, 0),
        probe_seed=round_.probe_seed,
        created_at=at,
    )
