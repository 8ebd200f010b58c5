"""A simulation from its first round to its last: what the ServerApp does.

All that is decided lies in the hub's database; `rounds.jsonl` says what a person wants to read.
A run that was killed goes on from there, and comes to the same digests.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from coldmerge.core.documents import LEARN_COEFFICIENTS, LEAVE_ONE_OUT, Consent
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.progress import Progress, silent
from coldmerge.rounds import slopes
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.state import State
from coldmerge_coordinator.store import contributions, learned, rounds
from coldmerge_coordinator.store.models import Round
from coldmerge_simulation import data
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.contributors.client_app import PAYLOAD
from coldmerge_simulation.coordinator.arrivals import Arrivals, Coming, Continuous, Windowed
from coldmerge_simulation.coordinator.desk import Desk, meet
from coldmerge_simulation.coordinator.hub import START, Hub
from coldmerge_simulation.coordinator.scoring import Scoring
from coldmerge_simulation.flower.compat import Grid
from coldmerge_simulation.folder import RunFolder, replace_file
from coldmerge_simulation.models import train_settings
from coldmerge_simulation.orders import EVALUATE, TRAIN, Answer, Order

DAY = timedelta(days=1)
"""How long a round takes that has no duration of its own: simulated time costs nothing."""
STARTED = "round.json"
_ADMITTED = contributions.ADMITTED


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
        arrivals = _arrivals(config, folder, hub, shares.names)
        run = _Run(config, folder, hub, desk, nodes, setting, arrivals, scoring, progress)
        run.all_rounds()


def _arrivals(
    config: SimulationConfig, folder: RunFolder, hub: Hub, names: tuple[str, ...]
) -> Arrivals:
    """Who comes from here on: after the last round that the journal has."""
    if config.round.continuous is None:
        return Windowed(config, names)
    done = folder.journal()
    release = hub.release_before(len(done) + 1)
    return Continuous(config, names, done[-1]["under_way"] if done else None, START, release)


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
    turns: dict[str, int] = field(default_factory=dict)

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
    arrivals: Arrivals
    scoring: Scoring
    progress: Progress
    heads: dict[str, int] = field(default_factory=dict)
    holding: set[tuple[int, str]] = field(default_factory=set)
    dropped: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

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
        self._score(self.config.rounds)  # if the last round published nothing

    def _remember(self, line: Mapping[str, Any]) -> None:
        """A contributor goes on from the head of the last round that took its contribution."""
        for name in line["accepted"]:
            self.heads[name] = line["turns"].get(name, line["round"])

    def _round(self, number: int) -> dict[str, Any]:
        row = self.hub.open_round(number, self._policy())
        self.arrivals.begin(row, number)
        entry = _Entry(number)
        if row.state == State.OPEN:
            self._admit_all(row, entry)
            row = self.hub.close_admission(row.id)
            self._note_arrivals(entry)
            self.folder.write(STARTED, vars(entry))
        else:
            self._come_back(row, entry)
        while State(row.state).active:
            if row.state == State.CANDIDATE:
                self._judge(row, entry)
                row = self._after_judging(row)
            else:
                self.progress(f"round {number}: merging", 0, 1)
                row = self.hub.merge(row.id)
        if row.release_number is not None:
            self._score(number)
        latest = self.hub.latest()
        self.arrivals.end(self.hub.clock.now(), (latest.number, latest.content_digest))
        return self._line(row, entry)

    def _after_judging(self, row: Round) -> Round:
        """The round once the gate has decided, or the probe is measured: its model is done with."""
        candidate, probing = row.candidate_digest, self._objective(row) is not None
        before = set(learned.directions_of(row))
        row = self.hub.close_judging(row.id)
        done_with = before | ({candidate} if candidate is not None and probing else set())
        self._remove(done_with - {row.base_digest, *learned.directions_of(row)})
        return row

    def _come_back(self, row: Round, entry: _Entry) -> None:
        """Go on with a round whose admission was over: with what was written down of it."""
        self._admit_all(row, entry)
        self._note_arrivals(entry)
        said = self.folder.read(STARTED) or {}
        if said.get("number") == entry.number:
            vars(entry).update(said)

    def _note_arrivals(self, entry: _Entry) -> None:
        about = self.arrivals.about()
        entry.dropped, entry.late = about["dropped"], about["late"]
        entry.attackers = about["attackers"]

    def _policy(self) -> RoundPolicy:
        policy = self.config.round.policy()
        if policy.duration or policy.continuous:
            return policy
        return policy.model_copy(update={"duration": DAY})

    def _admit_all(self, row: Round, entry: _Entry) -> None:
        """Ask those who take part, and admit what they send in the order of arrival.

        No more are asked than the round still takes. What was admitted before a crash is only
        counted: of a round that is sealed, that is all.
        """
        known = self.hub.admitted(row.id)
        most, counted, done = rounds.get_policy(row).seals_at, 0, 0
        title = f"round {entry.number}: training"
        total = most or self.config.contributors
        while coming := self.arrivals.take(None if most is None else most - counted):
            fresh = {one.name: one for one in coming if one.name not in known}
            if row.state != State.OPEN:
                fresh = {}
            entry.turns |= {one.name: one.turn for one in coming}
            counted += sum(known[o.name].state == _ADMITTED for o in coming if o.name in known)
            for order, answer in self.desk.ask(self._training(row, list(fresh.values()))):
                done += 1
                self.progress(title, len(known) + done, max(total, len(known) + done))
                one = fresh[order.contributor]
                counted += self._admit(row, one, answer, entry)
            if most is not None and counted >= most:
                return

    def _training(self, row: Round, coming: Sequence[Coming]) -> Iterator[Order]:
        merge = self.config.round.merge.model_dump(mode="json")
        private, consents = self.hub.private(), self._consents()
        for one in coming:
            values = {
                **self._about(row, one.turn, one.name),
                "base_digest": one.base_digest,
                "base_number": one.base_number,
                "now": one.at.isoformat(),
                "merge": merge,
                "private": private,
                "consents": consents,
                "head": self.heads.get(one.name),
                "attack": None if one.attack is None else one.attack.model_dump(mode="json"),
            }
            yield self._order(TRAIN, one.name, values, (one.base_digest,))

    def _consents(self) -> list[Consent]:
        """What everybody agrees to, of what the rounds ask."""
        rules = self.config.round
        singles = rules.gate is not None and rules.gate.isolate_singles
        asked = {LEAVE_ONE_OUT: singles, LEARN_COEFFICIENTS: rules.merge.coefficients is not None}
        return [one for one in self.config.consents if asked[one]]

    def _about(self, row: Round, number: int, name: str) -> dict[str, Any]:
        return {
            "run": str(self.folder.path) if self.setting.shared else None,
            "seed": self.config.seed,
            "federation": self.hub.model,
            "round": row.id,
            "number": number,
            "base_digest": row.base_digest,
            "base_number": row.base_number,
            "train": train_settings(self.config, name),
        }

    def _order(
        self, kind: str, name: str, values: Mapping[str, Any], digests: tuple[str, ...]
    ) -> Order:
        """An order; the models that it speaks of go with it, where no folder is shared."""
        files: dict[str, bytes] = {}
        gone = self.dropped.pop(self.nodes[name], None)
        values = {**values, "drop": sorted(gone)} if gone else values
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

    def _forget(self, name: str) -> None:
        """What a node holds that has failed: its models may be lost, or have never come."""
        self.holding = {pair for pair in self.holding if pair[0] != self.nodes[name]}

    def _admit(self, row: Round, one: Coming, answer: Answer, entry: _Entry) -> bool:
        """Whether it counts."""
        name = one.name
        payload = self.folder.outbox(row.id) / f"{name}.safetensors"
        if answer.error is not None:
            self._forget(name)
            entry.note(entry.failed, name, answer.error)
            return False
        try:
            if PAYLOAD in answer.files:
                payload.parent.mkdir(parents=True, exist_ok=True)
                replace_file(payload, answer.files[PAYLOAD])
            found = self.hub.admit(name, answer.signed(), payload, one.at)
        except ColdmergeError as error:
            entry.note(entry.refused, name, error)
            return False
        finally:
            payload.unlink(missing_ok=True)
        return found.state == _ADMITTED

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
                    self._forget(order.contributor)
                    raise answer.error
                self.hub.report(order.contributor, answer.signed())
            except ColdmergeError as error:
                entry.note(entry.silent, order.contributor, error)
            self.progress(title, done, len(names))
            if self.hub.get(row.id).state != State.CANDIDATE:
                return

    def _objective(self, row: Round) -> str | None:
        """What is asked about the candidate at hand, if it is a probe."""
        rules, search = rounds.get_policy(row).merge.coefficients, learned.search_of(row)
        return rules.objective if rules and search and not search.done else None

    def _slopes(self, row: Round) -> str:
        """What slopes are asked for of the candidate at hand: "", or of a task or layer."""
        rules, search = rounds.get_policy(row).merge.coefficients, learned.search_of(row)
        return slopes.asked(search, rules) if rules and search else ""

    def _judging(self, row: Round, number: int, names: tuple[str, ...]) -> Iterator[Order]:
        candidate, objective = row.candidate_digest or "", self._objective(row)
        told = self._slopes(row)
        directions = learned.directions_of(row) if told else ()
        for name in names:
            values = {
                **self._about(row, number, name),
                "candidate": candidate,
                "objective": objective,
                "slopes": told,
                "directions": directions,
                "probe_seed": row.probe_seed,
                "now": self.hub.clock.now().isoformat(),
            }
            yield self._order(EVALUATE, name, values, (row.base_digest, candidate, *directions))

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
            "accepted": sorted(n for n, s in states.items() if s == _ADMITTED),
            "bytes": sum(i.payload_bytes for i in known.values() if i.state == _ADMITTED),
            "quarantined": sorted(n for n, s in states.items() if s != _ADMITTED),
            **{key: value for key, value in vars(entry).items() if key != "number"},
            "coefficients": self._coefficients(row),
            "turns": entry.turns if self.config.round.continuous else {},
            "under_way": self.arrivals.state(),
            "simulated_time": self.hub.clock.now().isoformat(),
        }

    def _coefficients(self, row: Round) -> dict[str, dict[str, float]]:
        """What the round learned, by contributor and layer ("" where layers share one)."""
        found = learned.weights_of(row)
        return {name: dict(kept) for name, kept in found.of.items()} if found else {}

    def _tidy(self, round_id: str) -> None:
        """Remove what no later round needs."""
        shutil.rmtree(self.folder.outbox(round_id), ignore_errors=True)
        kept = {self.hub.latest().content_digest, *self.arrivals.bases()}
        for path in self.folder.models.glob("*"):
            if path.name not in {digest[:32] for digest in kept}:
                shutil.rmtree(path, ignore_errors=True)
        self._remove({digest for _, digest in self.holding if digest not in kept})

    def _remove(self, digests: set[str]) -> None:
        """Remove models here, and from every node with the next order that it gets."""
        for digest in digests:
            shutil.rmtree(self.folder.models / digest[:32], ignore_errors=True)
        for node, digest in [pair for pair in self.holding if pair[1] in digests]:
            self.holding.remove((node, digest))
            self.dropped[node].add(digest[:32])
