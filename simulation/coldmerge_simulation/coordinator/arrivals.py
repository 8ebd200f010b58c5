"""Who delivers when: the contributions to come, in the order of simulated time.

In windowed rounds everybody starts when the round opens. In continuous ones each starts when it
has nothing under way: on the release that is the latest then, whatever is merged meanwhile.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from coldmerge_coordinator.store.models import Round
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.contributors import conduct
from coldmerge_simulation.contributors.conduct import Attack, Conduct, Turn

TURNS_WITHOUT_END = 100
"""Turns per contributor after which a continuous round is given up: nobody ever delivers."""


@dataclass(frozen=True)
class Coming:
    """A contribution that will arrive `at`, trained on a release. `turn` counts those of one
    contributor, and decides what is random about it.
    """

    at: datetime
    name: str
    turn: int
    base_number: int
    base_digest: str
    attack: Attack | None = None


class Arrivals(Protocol):
    """What the driver asks for, round after round."""

    def begin(self, row: Round, number: int) -> None:
        """A round has opened."""
        ...

    def take(self, most: int | None) -> list[Coming]:
        """The next ones, at most so many; none: nobody comes any more."""
        ...

    def end(self, at: datetime, release: tuple[int, str]) -> None:
        """The round has ended, and `release` (number, digest) is the latest."""
        ...

    def about(self) -> dict[str, list[str]]:
        """Who dropped out, came late or attacked in this round: `dropped`, `late`, `attackers`."""
        ...

    def state(self) -> Any:
        """JSON-ready values that the next round cannot be had without."""
        ...

    def bases(self) -> Collection[str]:
        """Digests of the releases that somebody trains on."""
        ...


class Windowed:
    """Everybody who takes part in a round starts when it opens."""

    def __init__(self, config: SimulationConfig, names: Sequence[str]) -> None:
        self._config, self._names = config, names
        self._coming: list[Coming] = []
        self._about: dict[str, list[str]] = {}

    def begin(self, row: Round, number: int) -> None:
        """See `Arrivals`. Who will be too late, as far as is known beforehand, is not asked."""
        plan = _plan(self._config, number, self._names)
        coming = [
            Coming(
                row.opened_at + timedelta(seconds=turn.seconds),
                turn.name,
                number,
                row.base_number,
                row.base_digest,
                turn.attack,
            )
            for turn in plan.arrivals
        ]
        late = [one.name for one in coming if row.closes_at and one.at >= row.closes_at]
        self._coming = [one for one in coming if one.name not in late]
        self._about = {
            "dropped": [turn.name for turn in plan.turns if turn.drops],
            "late": late,
            "attackers": [turn.name for turn in plan.arrivals if turn.attack],
        }

    def take(self, most: int | None) -> list[Coming]:
        """See `Arrivals`."""
        taken, self._coming = self._coming[:most], self._coming[most:] if most else []
        return taken

    def end(self, at: datetime, release: tuple[int, str]) -> None:
        """Whoever has not come is too late; in the next round all start anew."""
        del at, release

    def about(self) -> dict[str, list[str]]:
        """See `Arrivals`."""
        late = [*self._about["late"], *(one.name for one in self._coming)]
        return {**self._about, "late": late}

    def state(self) -> Any:
        """Nothing."""
        return None

    def bases(self) -> Collection[str]:
        """None: in the next round all start on the release that is the latest then."""
        return ()


class Continuous:
    """Each contributor has one contribution under way; it starts the next one when the round that
    it was sent to has ended.

    `state` is what `state()` gave after the last round; None: there was none, and everybody
    starts at `at` on `release`.
    """

    def __init__(
        self,
        config: SimulationConfig,
        names: Sequence[str],
        state: Any,
        at: datetime,
        release: tuple[int, str],
    ) -> None:
        self._config, self._names = config, names
        self._plans: dict[int, Mapping[str, Turn]] = {}
        self._queue: list[tuple[datetime, str, int, int, str]] = []
        self._waiting: dict[str, int] = {}
        self._about: defaultdict[str, list[str]] = defaultdict(list)
        self._left = 0
        self._latest = release
        if state is None:
            for name in names:
                self._start(name, 1, at)
        else:
            self._queue = [(datetime.fromisoformat(row[0]), *row[1:]) for row in state]
            heapq.heapify(self._queue)

    def begin(self, row: Round, number: int) -> None:
        """See `Arrivals`."""
        del number
        self._about = defaultdict(list)
        self._latest = (row.base_number, row.base_digest)
        self._left = TURNS_WITHOUT_END * len(self._names)

    def take(self, most: int | None) -> list[Coming]:
        """See `Arrivals`. Dropouts start again as soon as their time is over."""
        taken: list[Coming] = []
        while self._queue and self._left and (most is None or len(taken) < most):
            self._left -= 1
            at, name, turn, number, digest = heapq.heappop(self._queue)
            planned = self._planned(turn).get(name)
            if planned is None or planned.drops:
                self._about["dropped"] += [name] if planned else []
                self._start(name, turn + 1, at)
                continue
            if planned.attack:
                self._about["attackers"].append(name)
            self._waiting[name] = turn
            taken.append(Coming(at, name, turn, number, digest, planned.attack))
        return taken

    def end(self, at: datetime, release: tuple[int, str]) -> None:
        """Whoever delivered starts again, on the release that is the latest now."""
        self._latest = release
        for name, turn in sorted(self._waiting.items()):
            self._start(name, turn + 1, at)
        self._waiting = {}

    def about(self) -> dict[str, list[str]]:
        """See `Arrivals`. Nobody is late: what comes later is merged later."""
        return {key: sorted(set(self._about[key])) for key in ("dropped", "late", "attackers")}

    def state(self) -> Any:
        """What is under way, a row each."""
        return [[row[0].isoformat(), *row[1:]] for row in sorted(self._queue)]

    def bases(self) -> Collection[str]:
        """See `Arrivals`."""
        return {row[4] for row in self._queue}

    def _start(self, name: str, turn: int, at: datetime) -> None:
        planned = self._planned(turn).get(name)
        seconds = planned.seconds if planned else self._config.participation.duration.seconds
        ends = at + timedelta(seconds=max(seconds, 0.001))
        heapq.heappush(self._queue, (ends, name, turn, *self._latest))

    def _planned(self, turn: int) -> Mapping[str, Turn]:
        """Everybody's n-th turn; those of the last few turns are kept."""
        if turn not in self._plans:
            for old in sorted(self._plans)[:-8]:
                del self._plans[old]
            found = _plan(self._config, turn, self._names)
            self._plans[turn] = {one.name: one for one in found.turns}
        return self._plans[turn]


def _plan(config: SimulationConfig, number: int, names: Sequence[str]) -> Conduct:
    return conduct.plan(config.participation, config.attackers, config.seed, number, names)
