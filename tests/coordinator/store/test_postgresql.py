"""What only PostgreSQL can do to a coordinator: refuse, be set wrongly, be ended, be full."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, make_url, text
from sqlalchemy.exc import IntegrityError, InternalError

from coldmerge.core.errors import ColdmergeError, ConfigError, ManifestError, UnavailableError
from coldmerge_coordinator.store import engine as engine_module
from coldmerge_coordinator.store.database import (
    HEAD,
    Database,
    downgrade,
    migrate,
    schema_revision,
)
from coldmerge_coordinator.store.engine import shown
from coldmerge_coordinator.store.models import Base
from tests.backends import chosen
from tests.support import until


@pytest.fixture
def url() -> str:
    return chosen.database_url()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


def refused(url: str) -> ColdmergeError:
    """What opening says; never the password."""
    database = Database(url)
    with pytest.raises(ColdmergeError) as caught:
        schema_revision(database)
    database.close()
    assert str(make_url(url).password) not in f"{caught.value}{caught.value.hint}{caught.value.ids}"
    return caught.value


def test_migrations_make_the_models_and_go_down_again() -> None:
    url = chosen.empty_database()
    for _ in range(2):
        migrate(url)
        database = Database(url)
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, Base.metadata) == []
        assert schema_revision(database) == HEAD
        downgrade(url, "base")
        assert inspect(database.engine).get_table_names() == ["alembic_version"]
        assert schema_revision(database) is None
        database.close()


def test_replicas_that_start_together_migrate_once() -> None:
    url, failed = chosen.empty_database(), list[Exception]()

    def start() -> None:
        try:
            migrate(url)
        except ColdmergeError as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_migration_that_fails_leaves_nothing() -> None:
    url = chosen.empty_database()
    database = Database(url)
    with database.write() as session:
        session.execute(text("CREATE TABLE upload (id TEXT)"))  # one that a migration makes
    with pytest.raises(UnavailableError):
        migrate(url)
    assert inspect(database.engine).get_table_names() == ["upload"]
    database.close()


def test_a_reader_keeps_its_snapshot_and_cannot_write(database: Database) -> None:
    counted = text("SELECT count(*) FROM master")
    with database.read() as reader:
        assert reader.execute(counted).scalar() == 0
        with database.write() as writer:
            writer.execute(text("INSERT INTO master VALUES ('x', '{}', now())"))
        assert reader.execute(counted).scalar() == 0
    with pytest.raises(UnavailableError) as caught, database.read() as reader:
        reader.execute(text("DELETE FROM master"))
    assert isinstance(caught.value.__cause__, InternalError)


def test_a_broken_constraint_stays_what_it_is(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(text("INSERT INTO master VALUES ('x', NULL, now())"))


def test_what_it_cannot_hold_is_the_callers_mistake(database: Database) -> None:
    query = text("SELECT 1 FROM master WHERE digest = :digest")
    with pytest.raises(ManifestError) as caught, database.read() as session:
        session.execute(query, {"digest": "a\0b"})
    assert caught.value.code == "store.not_storable"


@pytest.mark.parametrize("setting", ["fsync", "synchronous_commit"])
def test_a_server_that_forgets_commits_is_refused(url: str, setting: str) -> None:
    server = chosen.postgres
    server.execute(f"ALTER SYSTEM SET {setting} = off", "SELECT pg_reload_conf()")
    try:
        until("the setting", lambda: server.ask(f"SHOW {setting}") == "off")
        error = refused(url)
    finally:
        server.execute(f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()")
    until("the setting", lambda: server.ask(f"SHOW {setting}") == "on")
    assert isinstance(error, ConfigError)
    assert error.code == "store.not_durable"
    assert f"{setting}=off" in str(error)


def test_a_role_that_forgets_commits_is_refused(url: str) -> None:
    name = make_url(url).database
    chosen.postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    assert refused(url).code == "store.not_durable"


def test_a_wrong_password_is_said_and_not_shown(url: str) -> None:
    wrong = make_url(url).set(password="not-the-password-7531")
    assert refused(wrong.render_as_string(hide_password=False)).code == "store.login_refused"


def test_a_missing_database_is_said(url: str) -> None:
    elsewhere = make_url(url).set(database="nowhere")
    error = refused(elsewhere.render_as_string(hide_password=False))
    assert error.code == "store.no_database"


def test_a_server_that_is_down_may_be_called_again(url: str) -> None:
    elsewhere = make_url(url).set(port=1)
    error = refused(elsewhere.render_as_string(hide_password=False))
    assert (type(error), error.code) == (UnavailableError, "store.unavailable")


def test_no_more_connections(url: str) -> None:
    name = make_url(url).database
    chosen.postgres.execute(
        "CREATE ROLE few LOGIN PASSWORD 'few-secret' CONNECTION LIMIT 1",
        f"GRANT ALL ON DATABASE {name} TO few",
    )
    few = make_url(url).set(username="few", password="few-secret")
    database = Database(few.render_as_string(hide_password=False))
    with database.read() as session:
        session.execute(text("SELECT 1"))
        error = refused(few.render_as_string(hide_password=False))
    database.close()
    chosen.postgres.execute(f"REVOKE ALL ON DATABASE {name} FROM few", "DROP ROLE few")
    assert error.code == "store.too_many_connections"


def test_connections_that_were_cut_are_replaced(database: Database) -> None:
    cut = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name='coldmerge'"
    )
    with database.read() as session:
        session.execute(text("SELECT 1"))
    chosen.postgres.execute(cut)
    with database.write() as session:  # found dead before it is used
        session.execute(text("SELECT 1"))

    def write_and_be_cut() -> None:
        with database.write() as session:
            session.execute(text("INSERT INTO master VALUES ('x', '{}', now())"))
            chosen.postgres.execute(cut)
            session.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError) as caught:
        write_and_be_cut()
    assert caught.value.code == "store.unavailable"
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM master")).scalar() == 0


def test_who_waits_for_each_other_is_told_to_repeat(database: Database) -> None:
    with database.write() as session:
        session.execute(text("INSERT INTO lease VALUES ('a', 'h', 0, now()), ('b', 'h', 0, now())"))
    barrier, codes = threading.Barrier(2), list[str]()

    def cross(first: str, second: str) -> None:
        update = "UPDATE lease SET fence = fence + 1 WHERE name = '{}'"
        try:
            with database.write() as session:
                session.execute(text(update.format(first)))
                barrier.wait()
                session.execute(text(update.format(second)))
        except UnavailableError as error:
            codes.append(error.code)

    threads = [threading.Thread(target=cross, args=pair) for pair in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == ["store.busy"]


def test_a_row_that_is_locked_for_too_long(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BUSY_MS", 100)
    database = Database(url)
    with database.write() as session:
        session.execute(text("INSERT INTO lease VALUES ('a', 'h', 0, now())"))
    locked = text("SELECT * FROM lease FOR UPDATE")
    with database.write() as holder:
        holder.execute(locked)
        with pytest.raises(UnavailableError) as caught, database.write() as session:
            session.execute(locked)
    assert caught.value.code == "store.busy"
    database.close()


def test_a_paused_process_keeps_no_row_locked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "IDLE_MS", 200)
    paused, other = Database(url), Database(url)
    with paused.write() as session:
        session.execute(text("INSERT INTO lease VALUES ('a', 'h', 0, now())"))

    def pause() -> None:
        with paused.write() as session:
            session.execute(text("UPDATE lease SET holder = 'paused'"))
            with other.write() as next_one:  # waits until the server has ended the other
                next_one.execute(text("UPDATE lease SET holder = 'next'"))
            session.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError):
        pause()
    with other.read() as session:
        assert session.execute(text("SELECT holder FROM lease")).scalar() == "next"
    paused.close()
    other.close()


def test_a_patient_reader_may_read_files_meanwhile(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "IDLE_MS", 200)
    database, backend = Database(url), text("SELECT pg_backend_pid()")
    alive = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")

    def read_twice(*, patient: bool) -> None:
        with database.read(patient=patient) as session:
            session.execute(backend)
            with database.engine.connect() as other:
                pid = other.execute(backend).scalar()  # idle after the first, so ended after it
                other.rollback()
                other.execute(backend)
                with closing(Database(url)) as watch:

                    def ended() -> bool:
                        with watch.read() as look:
                            return not look.execute(alive, {"pid": pid}).scalar()

                    until("the end of who was idle", ended)
                other.invalidate()
            session.execute(backend)

    read_twice(patient=True)
    with pytest.raises(UnavailableError):
        read_twice(patient=False)
    database.close()


def test_without_its_driver_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from coldmerge_coordinator.store.database import Database\n"
        "from coldmerge.core.errors import ConfigError\n"
        "try: Database('postgresql+psycopg://me:s3cret@db/x?sslpassword=0ther')\n"
        "except ConfigError as error: print(error.code, error.message, error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("store.no_driver ")
    assert "coldmerge[coordinator,postgres]" in done.stdout
    assert not {"s3cret", "0ther"} & set(done.stdout.replace("=", " ").split())
    assert "s3cret" not in done.stdout


def test_passwords_are_not_shown() -> None:
    url = "postgresql+psycopg://me:s3cret@db/x?password=0ther&sslpassword=th1rd&connect_timeout=3"
    assert not any(secret in shown(url) for secret in ("s3cret", "0ther", "th1rd"))
    assert "connect_timeout=3" in shown(url)
