"""The mutator's inputs for one target, judged in this process: what `--jobs` runs several of."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.engine import Judge, Result, drive
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import TARGETS


def mutated(
    name: str, seed: int, count: int | None, seconds: float | None, findings: Path
) -> Result:
    """Judge `count` inputs, or as many as `seconds` allow; what fails is kept in `findings`."""
    target = TARGETS[name]
    return drive(Judge(target, findings), iter(Mutator(target, seed)), count, seconds)
