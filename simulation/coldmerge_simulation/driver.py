"""A simulation from its first round to its last: what the ServerApp does.

All that is decided lies in the hub's database; `rounds.jsonl` says what a person wants to read.
A run that was killed goes on from there, and comes to the same digests.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from coldmerge.core.errors import ColdmergeError
from coldmerge.core.progress import Progress, silent
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.state import State
from coldmerge_coordinator.store import contributions
from coldmerge_coordinator.store.models import Round
from coldmerge_simulation import conduct, data
from coldmerge_simulation.client_app import PAYLOAD
from coldmerge_simulation.compat import Grid
from coldmerge_simulation.conduct import Attack, Conduct
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.desk import Desk, meet
from coldmerge_simulation.folder import RunFolder, replace_file
from coldmerge_simulation.hub import Hub
from coldmerge_simulation.models import train_settings
from coldmerge_simulation.orders import EVALUATE, TRAIN, Answer, Order
from coldmerge_simulation.scoring import Scoring

DAY = timedelta(days=1)
"""How long a round takes that has no duration of its own: simulated time costs nothing."""
STARTED = "round.json"


@dataclass(frozen=True)
class Setting:
    """How the two sides reach each other: through the run's folder, or in messages only."""

    shared: bool = True
    at_a_time: int | None = None


def drive(grid: Grid, folder: RunFolder, setting: Setting, progress: Progress = silent) -> None:
    """Run the rounds that are left.

    Raises:
        ConflictError: another process runs this simulation.
        UnavailableError: the nodes did not come.
    """
    config = SimulationConfig.parse(folder.config()["config"])
    shares = data.make(config.data, config.contributors, config.seed, folder.data)
    with folder.alone(), Hub.open(folder, config) as hub:
        nodes = meet(grid, shares.names)
        at_a_time = setting.at_a_time or config.at_a_time
        desk = Desk(grid, nodes, at_a_time, config.patience.total_seconds())
        scoring = Scoring(folder, config, shares)
        run = _Run(config, folder, hub, desk, nodes, setting, scoring, progress)
        run.names = shares.names
        run.all_rounds()


@dataclass
class _Entry:
    """One line of the journal in the making."""

    number: int
    refused: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    attackers: list[str] = field(default_factory=list)
    silent: list[dict[str, str]] = field(default_factory=list)

    def note(self, to: list[dict[str, str]], name: str, error: ColdmergeError) -> None:
        """Write down why somebody's contribution or evaluation does not count."""
        got = "" if error.got is None else f" ({str(error.got)[:200]})"
        to.append({"contributor": name, "code": error.code, "message": f"{error.message}{got}"})


@dataclass
class _Run:
    """A run under way."""

    config: SimulationConfig
    folder: RunFolder
    hub: Hub
    desk: Desk
    nodes: Mapping[str, int]
    setting: Setting
    scoring: Scoring
    progress: Progress
    names: tuple[str, ...] = ()
    heads: dict[str, int] = field(default_factory=dict)
    holding: set[tuple[int, str]] = field(default_factory=set)

    def all_rounds(self) -> None:
        """Every round that the journal does not have."""
        done = self.folder.journal()
        for line in done:
            self._remember(line)
        self._score(0)
        for number in range(len(done) + 1, self.config.rounds + 1):
            started = time.monotonic()
            line = self._round(number)
            line["seconds"] = round(time.monotonic() - started, 3)
            line["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.folder.note(line)
            self._remember(line)
            self._tidy(line["id"])

    def _remember(self, line: Mapping[str, Any]) -> None:
        """A contributor goes on from the head of the last round that took its contribution."""
        for name in line["accepted"]:
            self.heads[name] = line["round"]

    def _round(self, number: int) -> dict[str, Any]:
        row = self.hub.open_round(number, self._policy())
        entry = _Entry(number)
        if row.state == State.OPEN:
            self._admit_all(row, entry)
            row = self.hub.close_admission(row.id)
            self.folder.write(STARTED, vars(entry))
        else:
            said = self.folder.read(STARTED) or {}
            entry = _Entry(**said) if said.get("number") == number else entry
        while State(row.state).active:
            if row.state == State.CANDIDATE:
                self._judge(row, entry)
                row = self.hub.close_judging(row.id)
            else:
                self.progress(f"round {number}: merging", 0, 1)
                self.hub.merge()
                row = self.hub.get(row.id)
        if row.release_number is not None:
            self._score(number)
        return self._line(row, entry)

    def _policy(self) -> RoundPolicy:
        policy = self.config.round.policy()
        return policy if policy.duration else policy.model_copy(update={"duration": DAY})

    def _admit_all(self, row: Round, entry: _Entry) -> None:
        """Ask everybody who takes part, and admit what they send in the order of arrival."""
        plan = self._conduct(entry.number)
        arrivals = self._arrivals(row, plan, entry)
        attacks = {turn.name: turn.attack for turn in plan.arrivals if turn.attack}
        known = self.hub.admitted(row.id)
        expected = [name for name in arrivals if name not in known]
        title, done = f"round {entry.number}: training", len(arrivals) - len(expected)
        self.progress(title, done, len(arrivals))
        training = self._training(row, entry.number, expected, arrivals, attacks)
        for order, answer in self.desk.ask(training):
            name = order.contributor
            if self.hub.pass_time(arrivals[name], row.id).state != State.OPEN:
                entry.late += [n for n in expected if arrivals[n] >= arrivals[name]]
                return
            self._admit(row, name, answer, arrivals[name], entry)
            done += 1
            self.progress(title, done, len(arrivals))

    def _conduct(self, number: int) -> Conduct:
        config = self.config
        return conduct.plan(config.participation, config.attackers, config.seed, number, self.names)

    def _arrivals(self, row: Round, plan: Conduct, entry: _Entry) -> dict[str, datetime]:
        """When whose contribution arrives, in that order; the others are noted.

        Who will be too late, as far as is known beforehand, is not asked to train.
        """
        found = {
            turn.name: row.opened_at + timedelta(seconds=turn.seconds) for turn in plan.arrivals
        }
        entry.dropped = [turn.name for turn in plan.turns if turn.drops]
        entry.attackers = [turn.name for turn in plan.arrivals if turn.attack]
        entry.late = [n for n, at in found.items() if row.closes_at and at >= row.closes_at]
        return {name: at for name, at in found.items() if name not in entry.late}

    def _training(
        self,
        row: Round,
        number: int,
        names: list[str],
        arrivals: Mapping[str, datetime],
        attacks: Mapping[str, Attack],
    ) -> Iterator[Order]:
        merge = self.config.round.merge.model_dump(mode="json")
        private = self.hub.private()
        for name in names:
            values = {
                **self._about(row, number),
                "now": arrivals[name].isoformat(),
                "merge": merge,
                "private": private,
                "head": self.heads.get(name),
                "attack": attacks[name].model_dump(mode="json") if name in attacks else None,
            }
            yield self._order(TRAIN, name, values, (row.base_digest,))

    def _about(self, row: Round, number: int) -> dict[str, Any]:
        return {
            "run": str(self.folder.path) if self.setting.shared else None,
            "seed": self.config.seed,
            "federation": self.hub.model,
            "round": row.id,
            "number": number,
            "base_digest": row.base_digest,
            "base_number": row.base_number,
            "train": train_settings(self.config),
        }

    def _order(
        self, kind: str, name: str, values: Mapping[str, Any], digests: tuple[str, ...]
    ) -> Order:
        """An order; the models that it speaks of go with it, where no folder is shared."""
        files: dict[str, bytes] = {}
        for digest in digests:
            body = self.hub.body(digest, self.folder)
            key = (self.nodes[name], digest)
            if not self.setting.shared and key not in self.holding:
                self.holding.add(key)
                files |= {
                    f"{body.name}/{path.relative_to(body)}": path.read_bytes()
                    for path in sorted(body.rglob("*"))
                    if path.is_file()
                }
        return Order(kind, name, values, files)

    def _admit(self, row: Round, name: str, answer: Answer, at: datetime, entry: _Entry) -> None:
        payload = self.folder.outbox(row.id) / f"{name}.safetensors"
        if answer.error is not None:
            entry.note(entry.failed, name, answer.error)
            return
        try:
            if PAYLOAD in answer.files:
                payload.parent.mkdir(parents=True, exist_ok=True)
                replace_file(payload, answer.files[PAYLOAD])
            self.hub.admit(name, answer.signed(), payload, at)
        except ColdmergeError as error:
            entry.note(entry.refused, name, error)
        finally:
            payload.unlink(missing_ok=True)

    def _judge(self, row: Round, entry: _Entry) -> None:
        """Ask for evaluations of the candidate until the gate has decided."""
        names = self.hub.evaluators(row.id)
        title = f"round {entry.number}: evaluating"
        self.progress(title, 0, len(names))
        for done, (order, answer) in enumerate(
            self.desk.ask(self._judging(row, entry.number, names)), 1
        ):
            try:
                if answer.error is not None:
                    raise answer.error
                self.hub.report(order.contributor, answer.signed())
            except ColdmergeError as error:
                entry.note(entry.silent, order.contributor, error)
            self.progress(title, done, len(names))
            if self.hub.get(row.id).state != State.CANDIDATE:
                return

    def _judging(self, row: Round, number: int, names: tuple[str, ...]) -> Iterator[Order]:
        candidate = row.candidate_digest or ""
        values = {
            **self._about(row, number),
            "candidate": candidate,
            "probe_seed": row.probe_seed,
            "now": self.hub.clock.now().isoformat(),
        }
        for name in names:
            yield self._order(EVALUATE, name, values, (row.base_digest, candidate))

    def _score(self, number: int) -> None:
        """Measure the latest release, if it is its turn and was not done."""
        every = self.config.evaluate.every
        due = every and (number % every == 0 or number == self.config.rounds)
        latest = self.hub.latest()
        if due and not self.scoring.has(latest.number):
            body = self.hub.body(latest.content_digest, self.folder)
            self.scoring.score(latest.number, body, self.progress)

    def _line(self, row: Round, entry: _Entry) -> dict[str, Any]:
        known = self.hub.admitted(row.id)
        states = {name: item.state for name, item in known.items()}
        return {
            "round": entry.number,
            "id": row.id,
            "state": str(row.state),
            "reason": row.reason,
            "base": row.base_number,
            "release": row.release_number,
            "accepted": sorted(n for n, s in states.items() if s == contributions.ADMITTED),
            "quarantined": sorted(n for n, s in states.items() if s != contributions.ADMITTED),
            **{key: value for key, value in vars(entry).items() if key != "number"},
            "simulated_time": self.hub.clock.now().isoformat(),
        }

    def _tidy(self, round_id: str) -> None:
        """Remove what no later round needs."""
        shutil.rmtree(self.folder.outbox(round_id), ignore_errors=True)
        kept = self.hub.latest().content_digest[:32]
        for path in self.folder.models.glob("*"):
            if path.name != kept:
                shutil.rmtree(path, ignore_errors=True)
