"""States of outer optimizers in the database, and the migration that made room for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge_coordinator.store import Store, releases, states
from coldmerge_coordinator.store.database import Database, downgrade, migrate
from coldmerge_coordinator.store.models import Blob
from coldmerge_coordinator.store.states import OuterState

STATE = OuterState("adam", 3, {"adam_m": {"body.w": "a" * 64}, "adam_v": {"body.w": "b" * 64}})


def test_a_digest_covers_everything_and_no_order() -> None:
    shuffled = OuterState("adam", 3, dict(sorted(STATE.slots.items(), reverse=True)))
    others = [
        replace(STATE, method="nesterov"),
        replace(STATE, steps=4),
        replace(STATE, slots={"adam_m": STATE.slots["adam_m"]}),
        replace(STATE, slots={"adam_m": STATE.slots["adam_v"], "adam_v": STATE.slots["adam_m"]}),
        replace(STATE, slots={slot: {"other.w": "a" * 64} for slot in STATE.slots}),
    ]
    assert shuffled.digest == STATE.digest
    assert len({state.digest for state in [STATE, *others]}) == 6
    assert STATE.names == {"body.w"}
    assert OuterState("nesterov").names == frozenset()


def test_a_state_survives_the_database_and_its_blobs_stay_private(
    store: Store, model: str, now: datetime
) -> None:
    with store.database.write() as session:
        release = releases.latest_release(session, model)
        content = releases.get_listing(session, release.content_digest)
        for _ in range(2):
            assert states.add_state(session, STATE, content, now) == STATE.digest
    with store.database.read() as session:
        assert states.get_state(session, STATE.digest) == STATE
        blob = session.get_one(Blob, "a" * 64)
        assert (blob.public, blob.nbytes) == (False, 4 * 2)
        with pytest.raises(NotFoundError) as caught:
            states.get_state(session, "0" * 64)
    assert caught.value.code == "state.unknown"


def test_the_same_content_with_another_state_is_another_release(
    store: Store, model: str, content: Callable[[Session, int], tuple[str, str]], now: datetime
) -> None:
    with store.database.write() as session:
        digests = content(session, 1)
        for state_digest in (STATE.digest, None):
            recipe: releases.Recipe = {"method": "mean"}
            releases.publish(
                *(session, store.signer, model, *digests, now),
                recipe=recipe,
                state_digest=state_digest,
            )
    with store.database.write() as session:
        back = releases.rollback(session, store.signer, model, 1, "its momentum", now)
        assert (back.number, back.state_digest) == (3, STATE.digest)
    with store.database.write() as session, pytest.raises(ConflictError) as caught:
        releases.rollback(session, store.signer, model, 1, "again", now)
    assert caught.value.code == "release.already_latest"


def test_a_database_from_before_is_brought_up_and_down_with_its_rows(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'truth.db'}"
    migrate(url, "0001")
    database = Database(url)
    with database.write() as session:
        for statement in (
            "INSERT INTO model VALUES ('m', '[]', '{}', NULL, '2026-01-01')",
            "INSERT INTO content VALUES ('c', '{}', '2026-01-01')",
            "INSERT INTO master VALUES ('d', '{}', '2026-01-01')",
            "INSERT INTO release VALUES ('m', 0, 'c', 'd', x'00', x'01', '2026-01-01')",
        ):
            session.execute(text(statement))
    before = columns(database)
    for _ in range(2):
        migrate(url, "0002")
        with database.read() as session:
            row = session.execute(text("SELECT content_digest, state_digest FROM release")).one()
        assert tuple(row) == ("c", None)
        assert columns(database) != before
        downgrade(url, "0001")
        assert columns(database) == before
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM release")).scalar() == 1
    database.close()


def columns(database: Database) -> dict[str, list[str]]:
    found = inspect(database.engine)
    return {
        table: [column["name"] for column in found.get_columns(table)]
        for table in found.get_table_names()
    }
