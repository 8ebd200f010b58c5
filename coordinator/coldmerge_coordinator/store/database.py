"""The database: one engine, read sessions, write transactions, migrations.

SQLite is the embedded default, PostgreSQL the one for large federations; the same SQL
runs on both. A write transaction on SQLite starts with BEGIN IMMEDIATE: what it reads
cannot change before it commits. On PostgreSQL rows that decide are read FOR UPDATE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from coldmerge.core.errors import ColdmergeError, ConflictError, ResourceError, UnavailableError

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0003"
"""The newest migration: a test compares it with the folder."""
BUSY_MS = 30_000
_WRITE = "coldmerge_write"
_LAST = "coldmerge_last"


def open_engine(url: str) -> Engine:
    """An engine with the settings that durability needs.

    SQLite: write-ahead log, `synchronous=FULL` (a commit survives a power cut), foreign
    keys, and 30 seconds of patience with another writer.
    """
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    # None: the driver starts no transactions of its own, `_begin_sqlite` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def before_commit(session: Session, act: Callable[[Session], None]) -> None:
    """Have `act` called as the last thing in the write transaction of `session`."""
    session.info.setdefault(_LAST, []).append(act)


class Database:
    """Sessions on one engine. Close it when done.

    `federation`: whose it is; sessions carry the name as `info["federation"]`.
    """

    def __init__(self, url: str, federation: str = "") -> None:
        self._info = {"federation": federation}
        self.engine = open_engine(url)
        self._writer = self.engine.execution_options(**{_WRITE: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session on one snapshot; whatever it changed is thrown away."""
        with (
            _translated(),
            Session(self.engine, expire_on_commit=False, info=self._info) as session,
        ):
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A write transaction: commits at the end, or rolls back when the block raises.

        Raises:
            UnavailableError: other writers held the database for 30 seconds.
            ResourceError: the disk is full.
        """
        with (
            _translated(),
            Session(self._writer, expire_on_commit=False, info=self._info) as session,
            session.begin(),
        ):
            session.connection()  # BEGIN now, not at the first query
            yield session
            for act in session.info.pop(_LAST, ()):
                act(session)

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise _our_error(error) from error
    except PoolTimeoutError as error:
        raise UnavailableError(
            "store.too_busy",
            "All connections to the database are in use.",
            hint="The coordinator is overloaded; the call may be repeated.",
        ) from error


def _our_error(error: OperationalError) -> ColdmergeError:
    reason = str(error.orig)
    if "disk is full" in reason or "No space left" in reason:
        return ResourceError(
            "store.disk_full",
            "The database cannot grow: the disk is full.",
            hint="Free some space on the coordinator and try again; nothing was lost.",
        )
    return UnavailableError(
        "store.unavailable",
        f"The database does not answer: {reason}.",
        hint="Another process may hold it, or it is down; the call may be repeated.",
    )


def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema up to `revision`, in one transaction.

    Raises:
        ConflictError: the database was made by a newer coldmerge.
    """
    _run(url, revision, up=True)


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to `revision` (`base`: nothing left), in one transaction."""
    _run(url, revision, up=False)


def _run(url: str, revision: str, *, up: bool) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    database = Database(url)
    try:
        with _translated(), database.engine.execution_options(**{_WRITE: True}).begin() as link:
            config.attributes["connection"] = link
            (command.upgrade if up else command.downgrade)(config, revision)
    except CommandError as error:
        raise ConflictError(
            "store.other_schema",
            f"The database {make_url(url).render_as_string()} has a schema this coldmerge "
            f"does not know: {error}.",
            hint="It was written by a newer version: run that one.",
        ) from error
    finally:
        database.close()


def schema_revision(database: Database) -> str | None:
    """The revision the schema is at; None for an empty database."""
    with database.engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
