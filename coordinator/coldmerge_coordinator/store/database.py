"""The database: one engine, read sessions, write transactions, migrations.

SQLite is the embedded default, PostgreSQL the one for large federations; the same SQL
runs on both. A write transaction on SQLite starts with BEGIN IMMEDIATE: what it reads
cannot change before it commits. On PostgreSQL rows that decide are read FOR UPDATE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError
from coldmerge_coordinator.store.engine import WRITE, open_engine, shown
from coldmerge_coordinator.store.trouble import our_error, translated

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0004"
"""The newest migration: a test compares it with the folder."""
_LAST = "coldmerge_last"
_MIGRATING = 0x636F6C64
"""The advisory lock of PostgreSQL under which one process changes the schema."""


def writer(engine: Engine) -> Engine:
    """The same engine, for transactions that write."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="READ COMMITTED")
    return engine.execution_options(**{WRITE: True})


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
        self._reader, self._writer = self.engine, writer(self.engine)
        if self.engine.dialect.name == "postgresql":
            self._reader = self.engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )

    @contextmanager
    def read(self, *, patient: bool = False) -> Iterator[Session]:
        """A session on one snapshot; whatever it changed is thrown away.

        `patient`: also when much time passes between two questions, as when files are read
        meanwhile. It locks no row, so nobody waits for it.
        """
        with (
            translated(),
            Session(
                self._reader, expire_on_commit=False, autoflush=False, info=self._info
            ) as session,
        ):
            if patient and self.engine.dialect.name == "postgresql":
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A write transaction: commits at the end, or rolls back when the block raises.

        Raises:
            UnavailableError: other writers held the database, or a row, for 30 seconds; or
                it is down. Nothing was written.
            ResourceError: the disk is full.
        """
        with (
            translated(),
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
        with translated(), writer(database.engine).begin() as link:
            _take_turns(link)
            config.attributes["connection"] = link
            (command.upgrade if up else command.downgrade)(config, revision)
    except ProgrammingError as error:
        raise our_error(error) from error
    except CommandError as error:
        raise ConflictError(
            "store.other_schema",
            f"The database {shown(url)} has a schema this coldmerge does not know: {error}.",
            hint="It was written by a newer version: run that one.",
        ) from error
    finally:
        database.close()


def _take_turns(link: Connection) -> None:
    """Let replicas that start together change the schema one after the other."""
    if link.dialect.name == "postgresql":
        link.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})


def schema_revision(database: Database) -> str | None:
    """The revision the schema is at; None for an empty database."""
    with translated(), database.engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
