"""What was refused of a contributor, in the audit log: bounded, whatever is thrown at us."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import structlog

from coldmerge.core.clock import Clock
from coldmerge.core.errors import (
    ColdmergeError,
    ManifestError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from coldmerge_coordinator import audit
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.store import Store

ONE_BY_ONE = 20
"""Refusals of a contributor that are logged each, per hour. Then one entry per doubling."""

_NO_REFUSAL = frozenset(
    f"upload.{what}"
    for what in ("incomplete", "lost", "stalled", "superseded", "unknown", "wrong_offset")
)
"""An upload that goes on elsewhere, or must begin again: nothing was refused."""

log = structlog.get_logger(__name__)


class Refusals:
    """Counts refusals per contributor and hour, and logs them; one for all handlers."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[str, int]] = {}

    @contextmanager
    def logged(self, who: Caller, call: str) -> Iterator[None]:
        """Log a refusal of what runs inside, and let it pass on.

        A coordinator that is busy, a caller who may not call at all and a stream that must
        go on elsewhere refuse no contribution.
        """
        try:
            yield
        except (UnavailableError, UnauthenticatedError, PermissionDeniedError):
            raise
        except ColdmergeError as error:
            if error.code not in _NO_REFUSAL:
                self._write(who, call, error)
            raise

    def _write(self, who: Caller, call: str, error: ColdmergeError) -> None:
        now = self._clock.now()
        count = self._count(who.contributor, now)
        if count > ONE_BY_ONE and count & (count - 1):
            return
        many = count > ONE_BY_ONE
        ids = {"contributor": who.contributor, "round": error.ids.get("round")}
        detail: dict[str, audit.Scalar] = {"code": error.code, "call": call}
        if isinstance(error, ManifestError):
            ids.pop("round")  # what a bad manifest says is not ours to repeat
        if many:
            detail |= {"this_hour": count}
        kind = "upload.refusals" if many else "upload.refused"
        try:
            with self._store.database.write() as session:
                audit.append(session, kind, who.actor, now, ids=ids, detail=detail)
        except ColdmergeError as failed:  # the refusal itself must reach the caller
            log.warning("audit.refusal_not_logged", code=failed.code, refused=error.code)

    def _count(self, contributor: str, now: datetime) -> int:
        hour = now.strftime("%Y-%m-%dT%H")
        with self._lock:
            last, count = self._counts.get(contributor, (hour, 0))
            count = count + 1 if last == hour else 1
            self._counts[contributor] = (hour, count)
            return count
