"""Engines: what a connection must be set to, so that a commit is durable, and waits end."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from coldmerge.core.errors import ConfigError

BUSY_MS = 30_000
"""Patience with another writer: of SQLite with its one, of PostgreSQL with that of a row."""
IDLE_MS = 20_000
"""PostgreSQL ends a transaction that waits longer for its process: one that was paused
must not keep rows locked.
"""
WRITE = "coldmerge_write"
_SECRETS = ("password", "sslpassword")
_POOL = {
    "pool_pre_ping": True,
    "pool_size": 8,
    "max_overflow": 8,
    "pool_timeout": BUSY_MS / 1000,
    "pool_recycle": 1800,
}
_LINK = {
    "application_name": "coldmerge",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "40000",
}
CACHE_KIB = 256
"""SQLite's page cache of each connection. The system caches the file too; at SQLite's own 2 MB,
fifteen connections grow by 30 MB until they are full."""

_DURABLE = "SELECT current_setting('fsync'), current_setting('synchronous_commit')"


def open_engine(url: str) -> Engine:
    """An engine with the settings that durability needs.

    SQLite: write-ahead log, `synchronous=FULL` (a commit survives a power cut), foreign
    keys, and 30 seconds of patience with another writer. PostgreSQL: a bounded pool that
    looks whether a connection still lives, the same patience with a locked row, and no
    server that acknowledges a commit before it is on disk.

    Raises:
        ConfigError: not a database URL, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        engine = _create(parsed)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            "store.bad_database_url",
            "The database URL names no kind of database that is known here.",
            expected="sqlite:///coldmerge.db or postgresql+psycopg://user@host/name",
            hint="Correct `database_url` in config.yaml.",
        ) from error
    except ImportError as error:
        raise ConfigError(
            "store.no_driver",
            f"The driver for {shown(parsed)} is not installed: {error}.",
            hint="Install it with `pip install 'coldmerge[coordinator,postgres]'`.",
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "connect", _prepare_postgresql)
    return engine


def _create(url: URL) -> Engine:
    # Without hide_parameters an error's text would show what was to be written.
    if url.get_backend_name() == "sqlite":
        return create_engine(url, hide_parameters=True)
    link = {key: value for key, value in _LINK.items() if key not in url.query}
    return create_engine(url, hide_parameters=True, connect_args=link, **_POOL)


def shown(url: str | URL) -> str:
    """A database URL without its password, wherever that stands."""
    parsed = make_url(url)
    masked = {key: "***" for key in _SECRETS if key in parsed.query}
    return parsed.update_query_dict(masked).render_as_string(hide_password=True)


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    # None: the driver starts no transactions of its own, `_begin_sqlite` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"cache_size=-{CACHE_KIB}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get(WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _prepare_postgresql(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET lock_timeout = {BUSY_MS}")
    cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_MS}")
    cursor.execute(_DURABLE)
    fsync, commit = cursor.fetchone() or ("off", "off")
    cursor.close()
    connection.commit()
    if fsync != "on" or commit == "off":
        raise ConfigError(
            "store.not_durable",
            "The PostgreSQL server forgets acknowledged commits when its power fails.",
            expected="fsync=on and synchronous_commit other than off",
            got=f"fsync={fsync}, synchronous_commit={commit}",
            hint="Correct postgresql.conf, or what ALTER ROLE or ALTER DATABASE has set.",
        )
