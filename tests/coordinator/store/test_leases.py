"""One holder at a time, and the slow one cannot write over its successor."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta

import pytest

from coldmerge.core.errors import ConflictError
from coldmerge_coordinator.store import Store, leases
from coldmerge_coordinator.store.leases import Held

TERM = timedelta(seconds=30)


def acquire(store: Store, holder: str, now: datetime) -> Held | None:
    with store.database.write() as session:
        return leases.acquire(session, "merge", holder, now, TERM)


def test_a_lease_is_held_until_it_expires(store: Store, now: datetime) -> None:
    assert acquire(store, "one", now) == Held("merge", "one", 1)
    assert acquire(store, "two", now + TERM - timedelta(seconds=1)) is None
    assert acquire(store, "two", now + TERM) == Held("merge", "two", 2)


def test_a_released_lease_is_free_and_its_fence_grows(store: Store, now: datetime) -> None:
    held = acquire(store, "one", now)
    assert held is not None
    with store.database.write() as session:
        leases.release(session, held, now)
    assert acquire(store, "two", now) == Held("merge", "two", 2)


def test_renewing_holds_on(store: Store, now: datetime) -> None:
    held = acquire(store, "one", now)
    assert held is not None
    with store.database.write() as session:
        leases.renew(session, held, now + TERM / 2, TERM)
    assert acquire(store, "two", now + TERM) is None


def test_a_holder_that_restarts_fences_its_former_self_off(store: Store, now: datetime) -> None:
    former, again = acquire(store, "one", now), acquire(store, "one", now)
    assert former is not None
    assert again == Held("merge", "one", 2)
    with pytest.raises(ConflictError), store.database.write() as session:
        leases.check(session, former)


def test_a_paused_holder_cannot_write(store: Store, now: datetime) -> None:
    slow = acquire(store, "one", now)
    assert slow is not None
    with store.database.write() as session:
        leases.check(session, slow)
    quick = acquire(store, "two", now + TERM)
    for use in (leases.check, lambda s, h: leases.renew(s, h, now, TERM)):
        with pytest.raises(ConflictError) as caught, store.database.write() as session:
            use(session, slow)
        assert caught.value.code == "lease.lost"
    with store.database.write() as session:
        leases.release(session, slow, now)  # harmless
        assert quick is not None
        leases.check(session, quick)


def test_a_lease_never_taken_is_lost(store: Store) -> None:
    with pytest.raises(ConflictError), store.database.write() as session:
        leases.check(session, Held("merge", "one", 1))


def test_racing_for_the_first_lease(store: Store, now: datetime) -> None:
    held: list[Held | None] = []

    def race(holder: str) -> None:
        held.append(acquire(store, holder, now))

    threads = [threading.Thread(target=race, args=(f"worker-{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 8
    assert len([lease for lease in held if lease is not None]) == 1
