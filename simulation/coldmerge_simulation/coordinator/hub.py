"""The coordinator of a simulation: the real one, in this process, on a clock of its own.

Admission, screening, receipts, rounds, merging, the gate and publication are what the
coordinator does for calls over the network; only who calls is different.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import func, select

from coldmerge.core.documents import Signed
from coldmerge.core.errors import ConflictError
from coldmerge.core.files import CHUNK_BYTES, PositionalFile
from coldmerge.core.task_vector import TaskVector
from coldmerge.rounds.policy import RoundPolicy, parse_template
from coldmerge.rounds.state import Abandon, Event, Resolve, State, Tick
from coldmerge_coordinator import exporting, setup
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.config import Limits
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.service import evaluations
from coldmerge_coordinator.service.intake import Intake
from coldmerge_coordinator.service.refusals import Refusals
from coldmerge_coordinator.service.uploads import LiveUpload, sweep
from coldmerge_coordinator.store import Store, continuous, contributions, people, releases, rounds
from coldmerge_coordinator.store.models import AuditLeaf, Contribution, Machine, Release, Round
from coldmerge_coordinator.worker import Worker
from coldmerge_simulation import derive
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.folder import RunFolder

START = datetime(2020, 1, 1, tzinfo=UTC)
MACHINE = "simulated"
PAUSE = timedelta(minutes=1)
"""Simulated time between a round and the next."""


class LogicalClock:
    """Time that only the simulation moves, and only forwards."""

    def __init__(self, time: datetime = START) -> None:
        self.time = time

    def now(self) -> datetime:
        """The simulated time."""
        return self.time

    def move_to(self, time: datetime) -> None:
        """Let time pass; an earlier `time` changes nothing."""
        self.time = max(self.time, time)


def found(folder: RunFolder, config: SimulationConfig, names: Sequence[str]) -> None:
    """Make the hub with its model and contributors; one that is there already stays.

    Raises:
        ConfigError: the round template cannot merge.
        CheckpointError: the model folder cannot be used.
    """
    if folder.hub.exists():
        return
    partial = folder.hub.with_name(".hub.partial")
    shutil.rmtree(partial, ignore_errors=True)
    limits = Limits(bytes_per_day=2**62, keep_free_bytes=0)
    setup.init(partial, federation=config.name, clock=LogicalClock(), limits=limits)
    with Store.open(partial) as store:
        add_model(
            store, config.name, folder.base, config.private, config.round, clock=LogicalClock()
        )
        _enrol(store, config.seed, names)
    partial.rename(folder.hub)


def _enrol(store: Store, seed: int, names: Sequence[str]) -> None:
    with store.database.write() as session:
        for name in names:
            people.make(session, name, "contributor", START)
            session.add(
                Machine(
                    contributor=name,
                    name=MACHINE,
                    identity_public_key=_public(seed, name),
                    certificate_serial=MACHINE,
                    enrolled_at=START,
                )
            )


def _public(seed: int, name: str) -> bytes:
    return derive.identity(seed, name).public_key().public_bytes_raw()


class Hub:
    """The rounds of one run. `model` is the simulation's name, and so is the federation.

    Round n (from 1) has an id and a probe seed that follow from the seed.
    """

    def __init__(self, store: Store, config: SimulationConfig) -> None:
        self.store, self.config, self.model = store, config, config.name
        self.clock = LogicalClock(_latest_time(store))
        self._intake = Intake(store, self.clock)
        self._refusals = Refusals(store, self.clock)
        self._worker = Worker(store, self.clock, holder="simulation")

    @classmethod
    @contextmanager
    def open(cls, folder: RunFolder, config: SimulationConfig) -> Iterator[Hub]:
        """The hub of a run, as whoever used it last has left it."""
        with Store.open(folder.hub) as store:
            sweep(store)
            hub = cls(store, config)
            try:
                yield hub
            finally:
                hub._intake.close()

    def round_id(self, number: int) -> str:
        """The id of the n-th round."""
        return f"round-{derive.token(self.config.seed, 'round', number)[:24]}"

    def round(self, number: int) -> Round | None:
        """The n-th round, if it was opened."""
        with self.store.database.read() as session:
            return session.get(Round, self.round_id(number))

    def latest(self) -> Release:
        """The newest release."""
        with self.store.database.read() as session:
            return releases.latest_release(session, self.model)

    def release_before(self, number: int) -> tuple[int, str]:
        """Number and digest of the release that was the latest before the n-th round opened."""
        row = self.round(number)
        if row is not None:
            return row.base_number, row.base_digest
        latest = self.latest()
        return latest.number, latest.content_digest

    def private(self) -> tuple[str, ...]:
        """The model's private patterns."""
        with self.store.database.read() as session:
            return tuple(releases.get_model(session, self.model).private_patterns)

    def open_round(self, number: int, policy: RoundPolicy) -> Round:
        """Open the n-th round, or find it where it was left."""
        known = self.round(number)
        if known is not None:
            return known
        self.clock.move_to(self._next_opening())
        seed = derive.number(self.config.seed, "probe", number)
        with self.store.database.write() as session:
            return rounds.open_round(
                session,
                self.model,
                policy,
                self.clock.now(),
                round_id=self.round_id(number),
                probe_seed=seed,
            )

    def _next_opening(self) -> datetime:
        """When the next round opens: continuous ones as their policy says, others after a pause."""
        with self.store.database.read() as session:
            model = releases.get_model(session, self.model)
            template = parse_template(model.template, "of the simulation")
            opens = continuous.next_opening(session, model, template)
        return opens or self.clock.now() + PAUSE

    def admitted(self, round_id: str) -> dict[str, Contribution]:
        """Who has contributed to a round so far: counted, or waiting in quarantine."""
        with self.store.database.read() as session:
            rows = contributions.of_round(session, round_id)
        return {row.contributor: row for row in rows if row.state in _STANDING}

    def admit(self, name: str, signed: Signed, payload: Path, at: datetime) -> Contribution:
        """Take a signed task vector that arrives at `at`, as the coordinator would.

        Raises:
            ColdmergeError: it is refused.
        """
        self.clock.move_to(at)
        who = self._caller(name)
        with self._refusals.logged(who, "Begin"):
            found = self._intake.begin(who, signed)
        if isinstance(found, Contribution):
            return found
        try:
            with self._refusals.logged(who, "Write"):
                _write(found, payload)
            with self._refusals.logged(who, "Commit"):
                return self._intake.commit(who, found.id)
        except BaseException:
            found.close()
            raise

    def report(self, name: str, signed: Signed) -> None:
        """Take a signed evaluation; the gate looks again.

        Raises:
            ColdmergeError: it is refused.
        """
        with self.store.database.write() as session:
            evaluations.report(
                session, self._caller(name), signed, self.clock.now(), self.store.signer
            )

    def move(self, round_id: str, event: Event) -> Round:
        """Apply an event to a round, now."""
        with self.store.database.write() as session:
            row = rounds.get(session, round_id, lock=True)
            rounds.apply(session, row, event, self.clock.now(), self.store.signer)
            return row

    def get(self, round_id: str) -> Round:
        """A round as it is now."""
        with self.store.database.read() as session:
            return rounds.get(session, round_id)

    def pass_time(self, until: datetime, round_id: str) -> Round:
        """Let time pass: a round whose deadline comes by moves."""
        self.clock.move_to(until)
        return self.move(round_id, Tick())

    def close_admission(self, round_id: str) -> Round:
        """Nobody comes any more: at its deadline the round seals, or misses its quorum."""
        row = self.get(round_id)
        if row.state == State.OPEN and row.closes_at is not None:
            row = self.pass_time(row.closes_at, round_id)
        if row.state == State.OPEN:  # it was extended, and nobody will come
            row = self.move(round_id, Abandon(row.reason or "nobody comes any more"))
        return row

    def merge(self, round_id: str) -> Round:
        """Merge a round that is sealed, which takes no time; if it fails, half a minute passes."""
        while self._worker.run_once():
            pass
        row = self.get(round_id)
        if row.state in (State.SEALED, State.MERGING):  # tried again after some seconds
            self.clock.move_to(self.clock.now() + timedelta(seconds=30))
        return row

    def evaluators(self, round_id: str) -> tuple[str, ...]:
        """Whose evaluations the gate waits for, less those that it has."""
        with self.store.database.read() as session:
            row = rounds.get(session, round_id)
            heard = {item.contributor for item in rounds.evaluations_of(session, row)}
            return tuple(name for name in rounds.view(session, row).evaluators if name not in heard)

    def close_judging(self, round_id: str) -> Round:
        """Nobody reports any more: the gate decides at its deadline; a held one is rejected."""
        row = self.get(round_id)
        if row.state == State.CANDIDATE and row.evaluation_closes_at is not None:
            row = self.pass_time(row.evaluation_closes_at, round_id)
        if row.state == State.CANDIDATE and row.held:
            why = f"nobody decides in a simulation: {row.reason}"
            row = self.move(round_id, Resolve(publish=False, reason=why))
        return row

    def body(self, digest: str, folder: RunFolder) -> Path:
        """The model folder of a release or candidate, made when it is first asked for."""
        place = folder.models / digest[:32]
        if not place.exists():
            folder.models.mkdir(exist_ok=True)
            exporting.lay_out(self.store, digest, place)
        return place

    def _caller(self, name: str) -> Caller:
        return Caller(name, MACHINE, "contributor", _public(self.config.seed, name))


_STANDING = contributions.WAITING_OR_ADMITTED


def _latest_time(store: Store) -> datetime:
    """Where simulated time stands: at the last thing that happened, all of which is logged."""
    with store.database.read() as session:
        return session.scalar(select(func.max(AuditLeaf.at))) or START


def _write(live: LiveUpload, payload: Path) -> None:
    ticket = live.take()
    start = TaskVector.open(payload).payload_start
    with PositionalFile(payload) as file:
        size = file.size - start
        if size != live.total:
            raise ConflictError(
                "simulation.other_payload",
                "The task vector's file is not the one that was signed.",
                expected=f"{live.total} bytes",
                got=f"{size} bytes",
                hint="Remove the run's outbox folder and resume.",
            )
        for offset in range(live.position, size, CHUNK_BYTES):
            stop = min(offset + CHUNK_BYTES, size)
            live.write(ticket, offset, bytes(file.read(start + offset, start + stop)))
