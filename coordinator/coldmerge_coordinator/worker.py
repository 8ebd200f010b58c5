"""The merge worker: `python -m coldmerge_coordinator.worker DIR`.

It takes a sealed round under a lease, merges it into blobs, and writes the candidate down
in one transaction that first checks the lease's fence. It may die at any moment: the next
one starts the merge from scratch and comes to the same bytes.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType

import structlog

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    ConflictError,
    IntegrityError,
    ResourceError,
    UnavailableError,
)
from coldmerge.core.files import raise_if_full
from coldmerge.rounds.state import MergeDone, MergeFailed, MergeStarted, State
from coldmerge_coordinator import replica
from coldmerge_coordinator.logs import log_to_stderr
from coldmerge_coordinator.merging.candidate import Candidate
from coldmerge_coordinator.merging.sources import Beat
from coldmerge_coordinator.merging.works import blobs_of, merge_round
from coldmerge_coordinator.store import (
    Store,
    collection,
    leases,
    notices,
    rounds,
    screening,
    states,
)
from coldmerge_coordinator.store import releases as release_table
from coldmerge_coordinator.store.leases import Held

TERM = timedelta(seconds=30)
BEAT = timedelta(seconds=5)
RETRY = timedelta(seconds=5)
RETRY_FULL = timedelta(seconds=30)
STALE = timedelta(minutes=10)
POLL_SECONDS = 0.1
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}
)
"""What a system says that is short of something now, or whose file server does not answer."""

log = structlog.get_logger()


class _Interrupted(Exception):  # noqa: N818 - not an error: a reason to stop
    """The worker shall end, or the round has moved on without it."""


class Worker:
    """Merges sealed rounds. `stop` ends the merge at hand within a block.

    `holder` names the worker in leases. A restarted worker of the same name takes its
    round back at once, so two must not run at a time: a lock on the folder makes sure.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        holder: str | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._store, self._clock = store, clock
        self._holder = holder or replica.holder(replica.WORKER, store.folder)
        self._stop = stop or threading.Event()
        self._not_before: dict[str, datetime] = {}

    def run_once(self) -> bool:
        """Merge one round if one waits: whether there was one to work on.

        A failed merge is counted on the round. A full disk, or a bucket that lets nobody in,
        is noted and tried again later.
        """
        now = self._clock.now()
        with self._store.database.read() as session:
            waiting = [row.id for row in rounds.rounds_to_merge(session)]
        for round_id in waiting:
            if self._not_before.get(round_id, now) <= now and (held := self._take(round_id)):
                self._work(round_id, held)
                return True
        return False

    def run(self, poll_seconds: float = POLL_SECONDS) -> None:
        """Work until `stop`."""
        self._store.blobs.sweep((self._clock.now() - STALE).timestamp())
        while not self._stop.is_set():
            try:
                busy = self.run_once()
            except ColdmergeError as error:
                log.warning("worker.retry", error=_sentence(error))
                busy = False
            if not busy:
                self._stop.wait(poll_seconds)

    def _take(self, round_id: str) -> Held | None:
        now = self._clock.now()
        with self._store.database.write() as session:
            held = leases.acquire(session, f"merge:{round_id}", self._holder, now, TERM)
            row = rounds.get(session, round_id, lock=True)
            if held is None or row.state not in (State.SEALED, State.MERGING):
                return None
            rounds.apply(session, row, MergeStarted(), now, self._store.signer)
        return held

    def _work(self, round_id: str, held: Held) -> None:
        logger = log.bind(round=round_id)
        try:
            with _disk_errors():
                heart = _Heart(self, round_id, held)
                candidate = merge_round(self._store, round_id, heart.beat)
                self._finish(round_id, held, candidate, heart.beat)
            logger.info("merge.done", candidate=candidate.content.digest, note=candidate.note)
        except _Interrupted as reason:
            logger.info("merge.interrupted", reason=str(reason))
            self._let_go(held)
        except UnavailableError as error:
            logger.info("merge.interrupted", reason=str(error))
            if error.code != "blob.collected":
                self._not_before[round_id] = self._clock.now() + RETRY
            self._let_go(held)
        except Exception as error:
            if _passes(error):
                logger.warning("merge.waits", error=_sentence(error))
                self._pause(round_id, held, error)
                return
            if _moved_on(error):
                logger.info("merge.superseded", reason=str(error))
                return
            logger.exception("merge.failed", error=_sentence(error))
            self._fail(round_id, held, error)

    def _finish(self, round_id: str, held: Held, candidate: Candidate, beat: Beat) -> None:
        blobs = self._store.blobs
        seen = collection.look(self._store.database, blobs, sorted(blobs_of(candidate)), beat)
        now = self._clock.now()
        with self._store.database.write() as session:
            leases.check(session, held)
            digests = release_table.add_content(session, candidate.content, candidate.masters, now)
            state = None
            if candidate.state is not None:
                state = states.add_state(session, candidate.state, candidate.content, now)
            collection.confirm(session, blobs, seen)
            row = rounds.get(session, round_id, lock=True)
            screening.note_likeness(session, row, candidate.inner)
            done = MergeDone(*digests, candidate_state=state, note=candidate.note)
            rounds.apply(session, row, done, now, self._store.signer)
            leases.release(session, held, now)

    def _fail(self, round_id: str, held: Held, error: Exception) -> None:
        now = self._clock.now()
        self._not_before[round_id] = now + RETRY
        with self._store.database.write() as session:
            leases.check(session, held)
            row = rounds.get(session, round_id, lock=True)
            failed = MergeFailed(_sentence(_told(error)))
            rounds.apply(session, row, failed, now, self._store.signer)
            leases.release(session, held, now)

    def _pause(self, round_id: str, held: Held, error: Exception) -> None:
        """Note once why the merge waits: on the round, and to the webhook."""
        now = self._clock.now()
        self._not_before[round_id] = now + RETRY_FULL
        self._store.blobs.sweep((now - STALE).timestamp())
        reason = f"the merge waits: {_told(error).message}"
        with self._store.database.write() as session:
            leases.check(session, held)
            leases.release(session, held, now)
            row = rounds.get(session, round_id, lock=True)
            if row.state != State.MERGING or row.reason == reason:
                return
            row.reason, row.version = reason, row.version + 1
            body = notices.about_round(row, "round.stuck", reason, self._store.federation)
            notices.insert(session, rounds.get_policy(row).webhook, body, now)

    def _let_go(self, held: Held) -> None:
        with self._store.database.write() as session:
            leases.release(session, held, self._clock.now())

    def hold(self, round_id: str, held: Held) -> None:
        """Renew the lease, and see whether there is still something to merge.

        Raises:
            ConflictError: another worker has taken the round.
        """
        now = self._clock.now()
        with self._store.database.write() as session:
            leases.renew(session, held, now, TERM)
            if rounds.get(session, round_id).state != State.MERGING:
                raise _Interrupted("the round was ended meanwhile")

    def now_or_stop(self) -> datetime:
        """The time, unless the worker shall end."""
        if self._stop.is_set():
            raise _Interrupted("the worker was asked to end")
        return self._clock.now()


class _Heart:
    """Renews the lease now and then, called once a block, by any thread of the merge."""

    def __init__(self, worker: Worker, round_id: str, held: Held) -> None:
        self._worker, self._round, self._held = worker, round_id, held
        self._last = worker.now_or_stop()
        self._lock = threading.Lock()

    def beat(self) -> None:
        with self._lock:
            now = self._worker.now_or_stop()
            if now - self._last >= BEAT:
                self._worker.hold(self._round, self._held)
                self._last = now


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise_if_full(error)
        raise


def _moved_on(error: Exception) -> bool:
    """Whether another process has the round now, or an admin has ended it."""
    codes = {"lease.lost", "round.wrong_state", "round.moved"}
    return isinstance(error, ConflictError) and error.code in codes


def _passes(error: Exception) -> bool:
    """Whether the same merge may well succeed later: then the round does not pay for it."""
    if isinstance(error, OSError):
        return error.errno in _PASSING
    if isinstance(error, ConfigError):  # the keys of the bucket, or of the database, are changed
        return error.code.startswith(("s3.", "store."))
    return isinstance(error, ResourceError) or getattr(error, "code", "") == "s3.not_stored"


def _told(error: Exception) -> ColdmergeError:
    """The error as participants may read it: what was not foreseen may name files and hosts."""
    if isinstance(error, ColdmergeError):
        return error
    if isinstance(error, OSError) and _passes(error):
        return ResourceError(
            "merge.system_short",
            "The coordinator's system is short of something, or its files do not answer: "
            "see the coordinator's log.",
            hint="The merge is tried again by itself; look for `merge.waits` in the log.",
        )
    return IntegrityError(
        "merge.unexpected",
        "An unexpected error stopped the merge: see the coordinator's log.",
        hint="Look for `merge.failed` in the worker's log: it has the error, and where it came up.",
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, ColdmergeError):
        return f"{error.message} [{error.code}]"
    return f"{type(error).__name__}: {error}"


def run_once(store: Store, clock: Clock) -> bool:
    """Merge one round if one waits."""
    return Worker(store, clock).run_once()


def main(arguments: list[str] | None = None) -> int:
    """Work on a coordinator's folder until SIGTERM or SIGINT, or until the parent is gone."""
    parser = argparse.ArgumentParser(prog="python -m coldmerge_coordinator.worker")
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("--parent", type=int, help="end when this is no longer the parent process")
    options = parser.parse_args(arguments)
    log_to_stderr()
    stop = _stop_event(options.parent)
    with (
        Store.open(options.folder) as store,
        replica.next_process(options.folder, replica.WORKER, stop),
    ):
        Worker(store, SystemClock(), stop=stop).run()
    return 0


def work(store: Store, clock: Clock) -> None:
    """Be the worker of a folder until SIGTERM or SIGINT."""
    Worker(store, clock, stop=_stop_event(None)).run()


def _stop_event(parent: int | None) -> threading.Event:
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    def watch() -> None:
        while not stop.wait(0.5):
            if os.getppid() != parent:
                stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
    return stop


if __name__ == "__main__":
    sys.exit(main())
