"""What a database says when it fails, in our errors: which may be repeated, which not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DataError, DBAPIError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    ManifestError,
    ResourceError,
    UnavailableError,
)

_BUSY = {
    "40001": "changes by two processes met",
    "40P01": "two processes waited for each other",
    "55P03": "another process holds a row of it for too long",
    "57014": "the server ended the query",
}
_SETUP = {
    "28000": ("store.login_refused", "the server refuses the login"),
    "28P01": ("store.login_refused", "the server refuses the login"),
    "3D000": ("store.no_database", "there is no such database"),
    "42501": ("store.no_rights", "its role may not do this"),
}
_CONNECTING = {
    # libpq gives no code for what fails before there is a connection, only the server's words.
    "too many clients already": "53300",
    "too many connections": "53300",
    "connection slots": "53300",
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    "no pg_hba.conf entry": "28000",
    'role "': "28000",
    'database "': "3D000",
}
_HINTS = {
    "store.login_refused": "Correct `database_url` in config.yaml, or the server's pg_hba.conf.",
    "store.no_database": "Make it with `createdb --encoding UTF8`, or correct `database_url`.",
    "store.no_rights": "Let the role of `database_url` own the database.",
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise what the database reports as one of our errors.

    A broken constraint or statement stays as it is: whoever wrote it must expect it.

    Raises:
        UnavailableError: it does not answer, or is too busy; the call may be repeated.
        ResourceError: its disk is full.
        ConfigError: it cannot be used like this.
        ManifestError: a value is not of a kind that it holds.
    """
    try:
        yield
    except (OperationalError, InternalError) as error:
        raise our_error(error) from error
    except ProgrammingError as error:
        if _code(error) not in _SETUP:
            raise
        raise our_error(error) from error
    except DataError as error:
        raise ManifestError(
            "store.not_storable",
            "A value of the call is nothing a database can hold.",
            expected="text without NUL characters, and numbers of at most 64 bits",
            hint="Take names and ids from what the coordinator lists.",
        ) from error
    except PoolTimeoutError as error:
        raise UnavailableError(
            "store.too_busy",
            "All connections to the database are in use.",
            hint="The coordinator is overloaded; the call may be repeated.",
        ) from error


def our_error(error: DBAPIError) -> ColdmergeError:
    """The error that says what the database's `error` means."""
    code, reason = _code(error), " ".join(str(error.orig).split())
    if code == "53100" or "disk is full" in reason or "No space left" in reason:
        return ResourceError(
            "store.disk_full",
            "The database cannot grow: the disk is full.",
            hint="Free some space on the coordinator and try again; nothing was lost.",
        )
    if code in _SETUP:
        kind, what = _SETUP[code]
        return ConfigError(
            kind,
            f"The database cannot be used, {what}: {reason}.",
            hint=_HINTS[kind],
        )
    if code in _BUSY:
        return UnavailableError(
            "store.busy",
            f"The database did not take the change, {_BUSY[code]}: {reason}.",
            hint="Nothing was written; the call may be repeated.",
        )
    if code == "53300":
        return UnavailableError(
            "store.too_many_connections",
            "The database takes no more connections.",
            hint="Raise `max_connections` of PostgreSQL: each process keeps up to 16.",
        )
    return UnavailableError(
        "store.unavailable",
        f"The database does not answer: {reason}.",
        hint="Another process may hold it, or it is down; the call may be repeated.",
    )


def _code(error: DBAPIError) -> str:
    """The SQLSTATE; empty on SQLite, which has none."""
    code = getattr(error.orig, "sqlstate", None)
    if code:
        return str(code)
    text = str(error.orig)
    if "FATAL" not in text and "fe_sendauth" not in text:
        return ""
    return next((found for words, found in _CONNECTING.items() if words in text), "")
