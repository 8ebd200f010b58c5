"""A PostgreSQL server for tests: its own process, folder and port, ended by its handle.

Its binaries come from the wheel `pgserver` or from Debian. It syncs as a real one does,
because the coordinator refuses one that does not; its folder is in memory where there is
room, so that syncing costs nothing.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.support import free_ports, until

SERVER = "postgres"
ADMIN = "postgres"
UNPRIVILEGED = ("postgres", "nobody")
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder below it is made with a random name
ROOM = 2**30
SETTINGS = {
    "autovacuum": "off",
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "max_wal_size": "256MB",
    "min_wal_size": "32MB",
    "shared_buffers": "32MB",
    "unix_socket_directories": "",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


def binaries() -> Path:
    """The folder with `initdb` and `postgres`.

    Raises:
        RuntimeError: there is no PostgreSQL on this machine.
    """
    spec = importlib.util.find_spec("pgserver")
    places = spec.submodule_search_locations if spec else None
    wheel = [Path(place) / "pginstall/bin" for place in places or ()]
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in (*wheel, *debian):
        if (folder / SERVER).is_file() and (folder / "initdb").is_file():
            return folder
    raise RuntimeError(
        "The tests found no PostgreSQL: `pip install pgserver`, or `apt install postgresql`."
    )


def _runs(folder: Path, account: dict[str, Any]) -> bool:
    """Whether the account may run what is there: a checkout may be below a private folder."""
    try:
        subprocess.run(
            [folder / SERVER, "--version"], cwd="/", capture_output=True, check=True, **account
        )
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _account() -> dict[str, Any]:
    """Who runs the server, as `subprocess` takes it: PostgreSQL refuses to be root."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = next(known[name] for name in UNPRIVILEGED if name in known)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}


def _roomy() -> Path | None:
    """Memory, where it has room; otherwise wherever temporary files go."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        return MEMORY
    return None


class Server:
    """Starts a server, makes databases in it, ends it."""

    def __init__(self, **settings: str) -> None:
        self._as = _account()
        self.password = secrets.token_urlsafe(16)
        self.folder = Path(tempfile.mkdtemp(prefix="coldmerge-pg-", dir=_roomy()))
        if self._as:
            os.chown(self.folder, self._as["user"], self._as["group"])
        self._settings = {**SETTINGS, **settings}
        self._log = self.folder / "log"
        try:
            self._bin = self._reachable(binaries())
            self._init()
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _reachable(self, found: Path) -> Path:
        """The binaries, or a copy of them where the account may read."""
        if _runs(found, self._as):
            return found
        package = found.parents[1]  # and beside it the libraries that its programs look for
        for part in (package, package.with_name(f"{package.name}.libs")):
            if part.is_dir():
                shutil.copytree(part, self.folder / "install" / part.name, symlinks=True)
        return self.folder / "install" / found.relative_to(package.parent)

    def _run(self, *command: str | Path) -> None:
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            **self._as,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")

    def _init(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        if self._as:
            os.chown(secret, self._as["user"], self._as["group"])
        self._run(
            self._bin / "initdb",
            "-D",
            self.folder / "data",
            "-U",
            ADMIN,
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
        )
        secret.unlink()

    def start(self) -> None:
        """Serve on a free port, which is another one each time."""
        for _ in range(5):
            (self.port,) = free_ports(1)
            options = [f"-c{key}={value}" for key, value in self._settings.items()]
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    [
                        self._bin / SERVER,
                        "-D",
                        self.folder / "data",
                        "-p",
                        str(self.port),
                        *options,
                    ],
                    cwd=self.folder,
                    env={"LC_ALL": "C", "TZ": "UTC"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    **self._as,
                )
            until("PostgreSQL to serve", self._answers_or_ended, 30)
            if self.process.poll() is None:
                return
        raise RuntimeError(f"PostgreSQL does not start:\n{self._log.read_text()}")

    def _answers_or_ended(self) -> bool:
        if self.process.poll() is not None:
            return True
        try:
            psycopg.connect(self.dsn(ADMIN), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End it, with all its connections."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def crash(self) -> None:
        """End it as a power cut would: it recovers when it starts again."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def close(self) -> None:
        """End it, and remove all it holds."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def dsn(self, database: str) -> str:
        """For libpq."""
        return f"postgresql://{ADMIN}:{self.password}@127.0.0.1:{self.port}/{database}"

    def url(self, database: str) -> str:
        """For the coordinator."""
        return self.dsn(database).replace("postgresql:", "postgresql+psycopg:", 1)

    def execute(self, *statements: str | sql.Composed) -> None:
        """As the server's admin, each statement by itself."""
        with psycopg.connect(self.dsn(ADMIN), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def ask(self, query: str) -> Any:
        """The one value that a query of the server's admin gives."""
        with psycopg.connect(self.dsn(ADMIN), autocommit=True) as connection:
            row = connection.execute(query).fetchone()
        return row[0] if row else None

    def create(self, template: str = "template0") -> str:
        """A new database, a copy of `template`: its name."""
        name = f"test_{secrets.token_hex(6)}"
        self.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        return name

    @contextmanager
    def shut(self, name: str) -> Iterator[None]:
        """Nobody is connected to the database, or connects to it."""
        known = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        self.execute(known.format(sql.Identifier(name), sql.SQL("false")))
        try:
            self.ask(
                "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "  # noqa: S608
                f"WHERE datname = '{name}'"
            )
            yield
        finally:
            self.execute(known.format(sql.Identifier(name), sql.SQL("true")))

    def drop(self, name: str) -> None:
        """Remove a database, whoever is still connected to it."""
        self.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )
