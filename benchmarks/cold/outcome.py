"""What a run of this benchmark writes down, and how it is read again.

```
OUT/plan.json     what was decided before anything ran
OUT/runs.jsonl    a line for each trained thing
OUT/scores.jsonl  a line for each measurement
```

The two journals are appended to, a line at a time; half a line, as a crash leaves it, is
no line. The test examples of a task are the same, in the same order, for every variant,
release and draw, so that any two measurements of it can be compared example by example.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from coldmerge.core.errors import ConflictError, DataError

PLAN, RUNS, SCORES = "plan.json", "runs.jsonl", "scores.jsonl"

Group = Literal["seen", "unseen"]
Protocol = Literal["lp100", "ft100", "full", "frozen"]
Hits = NDArray[np.bool_]
Line = TypeVar("Line", "Run", "Score")

BASE, MEAN, MULTITASK, ALONE, ONESHOT = "base", "mean", "multitask", "alone", "oneshot-"
"""Variants of the main study; one-shot merges are called `oneshot-<method>`."""


@dataclass(frozen=True)
class Plan:
    """What was decided before anything ran. A folder holds what belongs to one plan.

    Attributes:
        options: the options of the command.
        seen: sets that contributors train on, one for each.
        unseen: sets that nobody trains on.
        dropped: sets of the data folder that take no part, and why.
        settings: how contributors train and how releases are measured.
        model: `name`, `digest` (content digest of release 0).
        versions: of Python and of the libraries that figures depend on.
        machine: `cpu`, `cores`, `gpu` (or None).
        left_out: what the budget left out, in words, in the order of leaving out.
        costs: seconds that this table, the full table and the parts were expected to take.

    """

    options: Mapping[str, Any]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One trained or merged thing.

    Attributes:
        variant: `base`, `mean`, `oneshot-ties`, …; of `alone`, `task` says whose it is.
        seed: of the training.
        release: rounds behind it; 0 is the pretrained base.
        digest: content digest.
        bytes: what contributors shipped up to it.
        train_seconds: what its rounds took, in one process, one contributor after the other.
        steps: optimizer steps up to it, all contributors together.
        examples: training examples seen up to it, each as often as it was seen.
        task: the one task that it was trained on, where it is one.

    """

    variant: str
    seed: int
    release: int
    digest: str
    bytes: int = 0
    train_seconds: float = 0.0
    steps: int = 0
    examples: int = 0
    task: str | None = None


@dataclass(frozen=True)
class Score:
    """One measurement of one release on one task.

    Attributes:
        task: a seen or unseen set.
        protocol: `lp100` and `ft100` with 100 training examples, a probe or fine-tuning;
            `frozen` and `full` the same with all of a contributor's examples.
        draw: which of the draws of training examples.
        accuracy: share of right answers, 0 to 1.
        correct: `np.packbits` of right or wrong for each of the n test examples, in hex.

    """

    variant: str
    seed: int
    release: int
    task: str
    group: Group
    protocol: Protocol
    draw: int
    accuracy: float
    macro_f1: float
    correct: str
    n: int

    def hits(self) -> Hits:
        """Right or wrong: bool [n], in the order of the task's test part."""
        return unpack(self.correct, self.n)

    @property
    def key(self) -> tuple[str, int, int, str, str, int]:
        """What this is a measurement of; a folder holds one for each."""
        return (self.variant, self.seed, self.release, self.task, self.protocol, self.draw)


def pack(hits: Hits | Sequence[bool]) -> str:
    """Right or wrong as hex digits."""
    return np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()


def unpack(text: str, count: int) -> Hits:
    """What `pack` packed: bool [count]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count)
    return bits.astype(bool)


@dataclass(frozen=True)
class Outcome:
    """The three files of a folder. Measured twice is said once: the first line counts."""

    folder: Path

    def plan(self) -> Plan:
        """What was decided.

        Raises:
            DataError: there is no plan, or it cannot be read.

        """
        try:
            said = json.loads((self.folder / PLAN).read_text())
            lists = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
            return Plan(**{**said, **lists})
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                "cold.no_plan",
                f"{self.folder} holds no run of this benchmark.",
                expected=f"a file {PLAN}",
                hint="Make one with `python -m benchmarks.cold --data DIR --out DIR`.",
            ) from error

    def claim(self, plan: Plan) -> Plan:
        """Take the folder for a plan, or find that it was taken for the same one.

        What depends on the machine's speed alone (`costs`, `left_out`) is the first one's.

        Raises:
            ConflictError: the folder belongs to another plan.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / PLAN).exists():
            kept = self.plan()
            for key in ("options", "seen", "unseen", "settings", "model"):
                before, now = _plain(getattr(kept, key)), _plain(getattr(plan, key))
                if before != now:
                    raise _other_plan(self.folder, key, before, now)
            return kept
        partial = self.folder / f".{PLAN}"
        partial.write_text(json.dumps(asdict(plan), indent=1, ensure_ascii=False) + "\n")
        partial.rename(self.folder / PLAN)
        return self.plan()

    def runs(self) -> list[Run]:
        """Every trained thing."""
        found = (Run(**line) for line in self._lines(RUNS))
        return _first(found, lambda run: (run.variant, run.seed, run.release, run.task))

    def scores(self) -> list[Score]:
        """Every measurement."""
        found = (Score(**line) for line in self._lines(SCORES))
        return _first(found, lambda score: score.key)

    def note(self, *found: Run | Score) -> None:
        """Append lines, durably."""
        for name, kind in ((RUNS, Run), (SCORES, Score)):
            lines = [json.dumps(asdict(one)) for one in found if isinstance(one, kind)]
            if lines:
                self._append(name, lines)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            text = (self.folder / name).read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def _append(self, name: str, lines: Sequence[str]) -> None:
        path = self.folder / name
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < end:  # half a line
                file.truncate(whole)
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def _first(found: Iterable[Line], key: Callable[[Line], object]) -> list[Line]:
    """In the order written; of equal keys the first one."""
    known: dict[object, Line] = {}
    for one in found:
        known.setdefault(key(one), one)
    return list(known.values())


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _other_plan(folder: Path, key: str, before: Any, now: Any) -> ConflictError:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        key = f"{key}.{names[0]}"
        before, now = before.get(names[0]), now.get(names[0])
    return ConflictError(
        "cold.other_plan",
        f"{folder} holds a run with another plan.",
        expected=f"{key} = {json.dumps(before)}",
        got=json.dumps(now),
        hint="Repeat the command that it was started with, or choose another --out.",
        key=key,
    )
