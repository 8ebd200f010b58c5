"""Migrations, settings and transactions on real SQLite files."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError, ResourceError, UnavailableError
from coldmerge_coordinator.store import engine as engine_module
from coldmerge_coordinator.store.database import (
    HEAD,
    MIGRATIONS,
    Database,
    downgrade,
    migrate,
    schema_revision,
)
from coldmerge_coordinator.store.models import Base, Lease


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'truth.db'}"


def insert(session: Session, digest: str, content: str = "{}") -> None:
    values = {"digest": digest, "content": content}
    session.execute(text("INSERT INTO master VALUES (:digest, :content, '2026-01-01')"), values)


def spoil(session: Session) -> None:
    """Delete everything, then fail."""
    session.execute(text("DELETE FROM master"))
    for _ in range(2):
        insert(session, "twice")


def fill(session: Session) -> None:
    """Insert until the database may not grow."""
    pages = session.execute(text("PRAGMA page_count")).scalar()
    session.execute(text(f"PRAGMA max_page_count = {pages}"))
    for index in range(1000):
        insert(session, str(index), "x" * 4096)


def test_migrations_make_the_models(url: str) -> None:
    migrate(url)
    database = Database(url)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        made = {index["name"] for index in inspect(connection).get_indexes("round")}
    assert {"one_active_round", "ix_round_model"} <= made
    assert schema_revision(database) == HEAD
    database.close()


def test_migrations_go_down_and_up_again(url: str) -> None:
    migrate(url)
    migrate(url)
    downgrade(url, "base")
    database = Database(url)
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    assert schema_revision(database) is None
    migrate(url)
    assert schema_revision(database) == HEAD
    database.close()


def test_a_migration_that_fails_leaves_nothing(url: str) -> None:
    database = Database(url)
    with database.write() as session:
        session.execute(text("CREATE TABLE upload (id TEXT)"))  # the last one the migration makes
    with pytest.raises(UnavailableError):
        migrate(url)
    assert inspect(database.engine).get_table_names() == ["upload"]
    database.close()


def test_the_newest_migration_is_the_head() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_a_newer_schema_is_refused(url: str) -> None:
    migrate(url)
    database = Database(url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConflictError) as caught:
        migrate(url)
    assert caught.value.code == "store.other_schema"
    database.close()


def test_sqlite_is_set_up_to_survive(url: str) -> None:
    database = Database(url)
    with database.read() as session:
        for pragma, value in (
            ("journal_mode", "wal"),
            ("synchronous", 2),
            ("foreign_keys", 1),
            ("busy_timeout", 30_000),
        ):
            assert session.execute(text(f"PRAGMA {pragma}")).scalar() == value
    database.close()


def test_a_block_that_raises_writes_nothing(url: str) -> None:
    migrate(url)
    database = Database(url)
    with database.write() as session:
        insert(session, "x")
    with pytest.raises(IntegrityError), database.write() as session:
        spoil(session)
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM master")).scalar() == 1
    database.close()


def test_foreign_keys_are_enforced(url: str) -> None:
    migrate(url)
    database = Database(url)
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(
            text("INSERT INTO invitation VALUES ('t', 'nobody', 'r', '', '', '', NULL)")
        )
    database.close()


def test_writers_queue_up_and_lose_no_update(url: str) -> None:
    migrate(url)
    database = Database(url)
    with database.write() as session:
        session.execute(text("INSERT INTO lease VALUES ('n', 'h', 0, '2026-01-01 00:00:00')"))

    def add() -> None:
        for _ in range(25):
            with database.write() as session:
                lease = session.get_one(Lease, "n")
                lease.fence += 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.get_one(Lease, "n").fence == 100
    database.close()


def test_a_reader_keeps_its_snapshot_and_blocks_nobody(url: str) -> None:
    migrate(url)
    database = Database(url)
    with database.read() as reader:
        assert reader.execute(text("SELECT count(*) FROM master")).scalar() == 0
        with database.write() as writer:
            insert(writer, "x")
        assert reader.execute(text("SELECT count(*) FROM master")).scalar() == 0
    database.close()


def test_a_database_held_for_too_long_is_unavailable(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(url)
    monkeypatch.setattr(engine_module, "BUSY_MS", 50)
    database = Database(url)
    other = sqlite3.connect(tmp_path / "truth.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError) as caught, database.write():
        pass
    assert caught.value.code == "store.unavailable"
    other.close()
    database.close()


def test_a_full_disk_is_said(url: str) -> None:
    migrate(url)
    database = Database(url)
    with pytest.raises(ResourceError) as caught, database.write() as session:
        fill(session)
    assert caught.value.code == "store.disk_full"
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM master")).scalar() == 0
    database.close()
