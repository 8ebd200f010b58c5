"""Feeding a target inputs and judging what it does with them: time, memory, verdict.

A target returns whether it refused or accepted an input. Whatever else comes out of it is a
defect: `WrongAcceptanceError`, which its oracle raises, or any other exception, a crash.
"""

from __future__ import annotations

import hashlib
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

MAX_SECONDS = 0.1
MAX_MEMORY = 64 * 2**20
SUSPICIOUS_SECONDS = 0.02
SUSPICIOUS_MEMORY = 2**20
KEPT_FINDINGS = 20

CORPUS = Path(__file__).parent / "corpus"


class Verdict(Enum):
    """What a target did with an input."""

    REFUSED = "refused"
    ACCEPTED = "accepted"


class WrongAcceptanceError(Exception):
    """The oracle says that the input that was accepted is malformed."""


Run = Callable[[bytes], Verdict]
Repair = Callable[[bytearray, Random], bytes]


def as_it_is(data: bytearray, _random: Random) -> bytes:
    """The repair of a target whose inputs need none."""
    return bytes(data)


@dataclass(frozen=True)
class Target:
    """`run` judges one input. `tokens` are worth inserting; `repair` mends a mutated input
    (a length, an order) so that it passes the first check and reaches the later ones.
    """

    name: str
    run: Run
    tokens: tuple[bytes, ...] = ()
    repair: Repair = as_it_is

    def corpus(self) -> dict[str, bytes]:
        """The committed inputs by file name: `ok-…` are accepted, `bad-…` refused."""
        return {path.name: path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())}


def demand(sound: object, why: str) -> None:
    """What an oracle says of an accepted input.

    Raises:
        WrongAcceptanceError: it is not sound.
    """
    if not sound:
        raise WrongAcceptanceError(why)


@dataclass
class Result:
    """What came of all inputs of one target. Seconds are of the processor, memory is bytes."""

    target: str
    inputs: int = 0
    accepted: int = 0
    crashes: int = 0
    wrongly_accepted: int = 0
    worst_seconds: float = 0.0
    max_memory: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every promise held."""
        wrong = self.crashes + self.wrongly_accepted
        return not wrong and self.worst_seconds < MAX_SECONDS and self.max_memory < MAX_MEMORY

    def add(self, other: Result) -> None:
        """Count what another process found."""
        for name in ("inputs", "accepted", "crashes", "wrongly_accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("worst_seconds", "max_memory", "seconds"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.findings += other.findings

    def as_dict(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        return {**vars(self), "sound": self.sound}


class Judge:
    """Runs one target on inputs, one by one, and keeps what went wrong in `folder`."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._kinds: set[str] = set()
        with suppress(OSError):  # forget the process's peak so far, where Linux can
            Path("/proc/self/clear_refs").write_text("5")
        self._resident = _resident()
        self.result = Result(target.name)

    def try_input(self, data: bytes) -> None:
        """Run the target once; nothing escapes but what interrupts the whole process."""
        result = self.result
        result.inputs += 1
        began = time.process_time()
        try:
            if self._target.run(data) is Verdict.ACCEPTED:
                result.accepted += 1
        except WrongAcceptanceError as error:
            result.wrongly_accepted += 1
            self._keep("accepted", str(error), data)
        except Exception as error:  # noqa: BLE001
            result.crashes += 1
            self._keep("crash", f"{type(error).__name__}: {str(error)[:200]}", data)
        took = time.process_time() - began
        if took > SUSPICIOUS_SECONDS:
            took = min(took, *(self._again(data) for _ in range(3)))
        if took > result.worst_seconds:
            result.worst_seconds = took
            if took > SUSPICIOUS_SECONDS:
                self._keep("slow", f"{took * 1000:.0f} ms", data)
        resident = _resident()
        if took > SUSPICIOUS_SECONDS or resident - self._resident > SUSPICIOUS_MEMORY:
            self._resident = max(resident, self._resident)
            self._measure_memory(data)

    def _again(self, data: bytes) -> float:
        began = time.process_time()
        _quietly(self._target.run, data)
        return time.process_time() - began

    def _measure_memory(self, data: bytes) -> None:
        tracemalloc.start()
        _quietly(self._target.run, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > self.result.max_memory:
            self.result.max_memory = peak
            if peak > MAX_MEMORY / 4:
                self._keep("large", f"{peak / 2**20:.0f} MiB", data)

    def _keep(self, kind: str, why: str, data: bytes) -> None:
        known = f"{kind} {why[:40]}"
        if known in self._kinds or len(self._kinds) >= KEPT_FINDINGS:
            return
        self._kinds.add(known)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._target.name}-{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
        (self._folder / name).write_bytes(data)
        self.result.findings.append(f"{self._folder / name}: {why}")


def _quietly(run: Run, data: bytes) -> None:
    try:
        run(data)
    except Exception:  # noqa: BLE001
        return


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drive(
    judge: Judge, inputs: Iterator[bytes], count: int | None, seconds: float | None
) -> Result:
    """Judge `count` inputs, or as many as `seconds` allow."""
    began = time.monotonic()
    for number, data in enumerate(inputs, 1):
        judge.try_input(data)
        if number == count:
            break
        if number % 64 == 0 and seconds is not None and time.monotonic() - began > seconds:
            break
    judge.result.seconds = time.monotonic() - began
    return judge.result
