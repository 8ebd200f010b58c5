"""A coordinator that goes back, shows two histories, keeps news back or publishes in secret.

It holds the federation's keys, and is served on real sockets; clients keep the last
checkpoint they verified, and refuse. Nothing in their home is lost by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from coldmerge.core.errors import ColdmergeError, IntegrityError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import admin_pb2
from coldmerge_client import checkpoints, enrol
from coldmerge_client.home import Home
from coldmerge_client.pull import pull
from coldmerge_client.session import Session
from coldmerge_coordinator.rotation import rotate_signing
from coldmerge_coordinator.store import releases
from coldmerge_coordinator.store.models import AuditNode, Release
from tests.backends import copy_coordinator, on_postgresql
from tests.harness import MODEL, Live, coordinator
from tests.support import FixedClock


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with coordinator(tmp_path / "hub") as live:
        yield live


@pytest.fixture
def join(live: Live, tmp_path: Path) -> Callable[[str], Home]:
    def run(name: str) -> Home:
        ttl = Duration()
        ttl.FromTimedelta(timedelta(hours=1))
        request = admin_pb2.InviteRequest(contributor=name, role="contributor", ttl=ttl)
        made = call(live.local_admin.Invite, request)
        home = Home(tmp_path / f"home-{name}")
        enrol.join(made.invitation, made.fingerprint, home, "laptop")
        return home

    return run


def events(live: Live, count: int = 3) -> None:
    """Let the log grow."""
    for number in range(count):
        live.token(f"org-{number}")


def copy_of(live: Live, to: Path) -> Path:
    """The folder as it is now: database, keys, blobs."""
    if not on_postgresql():
        with live.store.database.engine.connect() as link:
            link.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    copy_coordinator(live.folder, to)
    return to


@contextmanager
def served(folder: Path) -> Iterator[Live]:
    other = Live(folder)
    try:
        yield other
    finally:
        other.close()


def visit(home: Home, live: Live) -> Session:
    """A session of this home with whoever answers at the coordinator's address now."""
    address = live.servers.addresses.api
    home.save_membership(replace(home.membership(), address=address))
    return Session.open(home, timeout=10)


def refresh(home: Home, live: Live) -> AuditCheckpoint:
    with visit(home, live) as session:
        found = checkpoints.refresh(session)
    assert found is not None
    return found


def kept(home: Home, *, but: str) -> dict[str, object]:
    state: dict[str, object] = json.loads((home.path / "state.json").read_text())
    return {key: value for key, value in state.items() if key != but}


def refused(
    home: Home, live: Live, act: Callable[[Session], object], *, but: str = ""
) -> IntegrityError:
    """The refusal; what the home had verified (`but` one thing) is still what it was."""
    before = kept(home, but=but)
    folders = sorted(path for path in home.path.rglob("*") if "locks" not in path.parts)
    with visit(home, live) as session, pytest.raises(IntegrityError) as caught:
        act(session)
    assert kept(home, but=but) == before
    assert sorted(path for path in home.path.rglob("*") if "locks" not in path.parts) == folders
    return caught.value


def pull_latest(session: Session) -> object:
    return pull(session, MODEL)


def test_a_copy_of_yesterday_is_refused(
    live: Live, join: Callable[[str], Home], tmp_path: Path
) -> None:
    home = join("a")
    yesterday = copy_of(live, tmp_path / "yesterday")
    events(live)
    with visit(home, live) as session:
        pull(session, MODEL)
    with served(yesterday) as old:
        assert refused(home, old, checkpoints.refresh).code == "checkpoint.rolled_back"
        assert refused(home, old, pull_latest).code == "checkpoint.rolled_back"
        events(old, 8)  # longer than what the home has seen, but not the same
        assert refused(home, old, pull_latest).code == "checkpoint.forked"
    events(live)
    with visit(home, live) as session:
        pull(session, MODEL)


@pytest.mark.parametrize(("ago", "believed"), [(120, False), (10, True)], ids=["thief", "replica"])
def test_a_replaced_key_signs_no_more_checkpoints(
    live: Live, join: Callable[[str], Home], tmp_path: Path, ago: int, believed: bool
) -> None:
    """With the old key, and all that the coordinator has: only the date is against it."""
    home, away = join("a"), join("b")
    assert refresh(home, live).key == 0
    old_key = (live.folder / "keys" / "signing.key").read_bytes()
    rotate_signing(live.folder, FixedClock(live.clock.now() - timedelta(minutes=ago)))
    events(live)
    assert refresh(home, live).key == 1
    copied = copy_of(live, tmp_path / "copied")
    (copied / "keys" / "signing.key").write_bytes(old_key)
    with served(copied) as other:
        events(other)
        if believed:
            assert refresh(home, other).key == 0
        else:
            assert refused(home, other, checkpoints.refresh).code == "checkpoint.retired_key"
            assert refused(home, other, pull_latest).code == "checkpoint.retired_key"
            assert refresh(away, other).key == 0, "who never saw the new key cannot know"
            assert refresh(home, live).key == 1


def test_two_histories_are_found_out_by_whoever_sees_both(
    live: Live, join: Callable[[str], Home], tmp_path: Path
) -> None:
    one, two = join("a"), join("b")
    both = refresh(one, live)
    with served(copy_of(live, tmp_path / "fork")) as fork:
        events(live, 4)
        events(fork, 4)
        here, there = refresh(one, live), refresh(two, fork)
        assert here.size == there.size > both.size
        assert here.root != there.root
        assert refused(one, fork, pull_latest).code == "checkpoint.forked"
        assert refused(two, live, pull_latest).code == "checkpoint.forked"
        events(live, 1)
        assert refused(two, live, pull_latest).code == "checkpoint.forked"
    refresh(one, live)


@pytest.mark.parametrize(
    ("moved", "code"),
    [
        (timedelta(hours=-2), "checkpoint.stale"),
        (timedelta(hours=-30), "checkpoint.stale"),
        (timedelta(minutes=20), "checkpoint.from_the_future"),
    ],
)
def test_a_frozen_or_foreign_clock_is_refused(
    live: Live, join: Callable[[str], Home], moved: timedelta, code: str
) -> None:
    home = join("a")
    refresh(home, live)
    live.clock.offset = moved
    events(live, 1)
    error = refused(home, live, pull_latest)
    assert error.code == code
    assert "clock" in error.hint
    live.clock.offset = timedelta(0)
    events(live, 1)
    refresh(home, live)


def publish(live: Live, *, logged: bool) -> int:
    """Publish release 0's content again, behind everybody's back unless `logged`."""
    with live.store.database.write() as session:
        first = releases.get_release(session, MODEL, 0)
        made = releases.publish(
            session,
            live.store.signer,
            MODEL,
            first.content_digest,
            first.master_digest,
            live.clock.now(),
            recipe={"method": "mean"},
        )
        if not logged:
            session.info.clear()
        return made.number


def test_a_release_that_was_never_logged_is_refused(
    live: Live, join: Callable[[str], Home]
) -> None:
    home = join("a")
    refresh(home, live)
    number = publish(live, logged=False)
    events(live, 1)
    for which in (None, number):
        error = refused(home, live, partial(pull, model=MODEL, number=which), but="checkpoint")
        assert error.code == "release.not_in_the_log"
    assert home.local_releases(MODEL) == []


def test_an_old_release_is_not_the_latest(live: Live, join: Callable[[str], Home]) -> None:
    """The log says 1; this client, who never saw it, is told that 0 is the newest."""
    home = join("a")
    number = publish(live, logged=True)
    assert refresh(home, live).releases[MODEL].number == number
    with live.store.database.write() as session:
        session.delete(session.get_one(Release, (MODEL, number)))
    assert refused(home, live, pull_latest).code == "release.not_latest"


def test_a_log_that_lost_an_entry_proves_nothing(live: Live, join: Callable[[str], Home]) -> None:
    """An edited leaf below a head that was signed before: the proof no longer fits."""
    home = join("a")
    events(live)
    before = refresh(home, live)
    with live.store.database.write() as session:
        for level in range(before.size.bit_length()):
            row = session.get(AuditNode, (level, 0))
            if row is not None:
                row.hash = bytes(32)
    events(live, 1)
    with visit(home, live) as session, pytest.raises(ColdmergeError) as caught:
        pull(session, MODEL)
    assert caught.value.code == "checkpoint.forked"
