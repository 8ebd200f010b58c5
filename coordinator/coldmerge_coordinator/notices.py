"""Telling admins: notices go to the webhook as JSON, again and again until it takes them."""

from __future__ import annotations

import httpx
import structlog

from coldmerge.core.clock import Clock
from coldmerge_coordinator.store import Database, notices
from coldmerge_coordinator.store.models import Notice

TIMEOUT_SECONDS = 5.0
AT_ONCE = 20
ID_HEADER = "Coldmerge-Notice"

log = structlog.get_logger(__name__)


class Notifier:
    """Delivers due notices, oldest first. A receiver may see one twice: compare the id.

    A receiver that fails is left alone for the rest of the call, so that a dead one costs
    one time-out and not one per notice. Proxies are taken from the usual variables.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock
        self._client = httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False)

    def deliver_due(self) -> int:
        """Try every notice that is due: how many arrived."""
        with self._database.read() as session:
            due = notices.due(session, self._clock.now(), AT_ONCE)
        arrived, failing = 0, set[str]()
        for notice in due:
            if notice.url in failing:
                continue
            problem = self._post(notice)
            if problem:
                failing.add(notice.url)
                log.warning("notice.failed", notice=notice.id, problem=problem)
            arrived += not problem
            self._settle(notice.id, delivered=not problem)
        return arrived

    def _post(self, notice: Notice) -> str | None:
        """Why it did not arrive, or None."""
        body = {**notice.body, "id": notice.id}
        headers = {ID_HEADER: notice.id, "User-Agent": "coldmerge"}
        try:
            with self._client.stream("POST", notice.url, json=body, headers=headers) as response:
                return None if response.is_success else f"HTTP status {response.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def _settle(self, notice_id: str, *, delivered: bool) -> None:
        with self._database.write() as session:
            settle = notices.delivered if delivered else notices.failed
            settle(session, notice_id, self._clock.now())

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()
