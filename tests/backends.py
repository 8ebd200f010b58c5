"""Where a test's coordinator keeps the truth, and where tensors: chosen on the command line.

Everything that makes a coordinator's folder takes its settings from here, so that the same
tests run on each: `coordinator_config` for those that make one in this process,
`init_options` for those that call `coldmerge coordinator init`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from coldmerge_coordinator import config as settings
from coldmerge_coordinator.store.database import Database, migrate
from tests import s3
from tests.postgres import Server

DATABASES = ("sqlite", "postgresql")
BLOBS = ("disk", "s3")


class Backends:
    """What was chosen, and the servers that run for it in this process."""

    def __init__(self) -> None:
        self.database = DATABASES[0]
        self.blobs = BLOBS[0]
        self._postgres: Server | None = None
        self._template = ""
        self._made: list[str] = []

    @property
    def postgres(self) -> Server:
        """The PostgreSQL server of this process, started when first needed."""
        if self._postgres is None:
            self._postgres = Server()
        return self._postgres

    def empty_database(self) -> str:
        """The URL of a new PostgreSQL database without a table."""
        return self._make("template0")

    def database_url(self) -> str:
        """The URL of a new PostgreSQL database with the newest schema."""
        if not self._template:
            template = self.postgres.create()
            migrate(self.postgres.url(template))
            self._template = template
        return self._make(self._template)

    def copy_database(self, url: str) -> str:
        """The URL of a copy of a PostgreSQL database; whoever is connected must do so again."""
        name = url.rsplit("/", 1)[-1]
        with self.postgres.shut(name):
            return self._make(name)

    def _make(self, template: str) -> str:
        self._made.append(self.postgres.create(template))
        return self.postgres.url(self._made[-1])

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Drops the databases that were made inside."""
        before = len(self._made)
        yield
        while len(self._made) > before:
            self.postgres.drop(self._made.pop())

    def close(self) -> None:
        """End the servers."""
        if self._postgres is not None:
            self._postgres.close()
            self._postgres = None
        s3.close()


chosen = Backends()


def add_options(parser: pytest.Parser) -> None:
    """The options of pytest's command line."""
    parser.addoption(
        "--database",
        choices=DATABASES,
        default=DATABASES[0],
        help="what the coordinators of the tests keep their truth in",
    )
    parser.addoption(
        "--blobs",
        choices=BLOBS,
        default=BLOBS[0],
        help="where the coordinators of the tests keep tensors and task vectors",
    )


def configure(config: pytest.Config) -> None:
    """Read the options."""
    chosen.database = config.getoption("--database")
    chosen.blobs = config.getoption("--blobs")


def on_postgresql() -> bool:
    """Whether coordinators are made on PostgreSQL."""
    return chosen.database == "postgresql"


def in_s3() -> bool:
    """Whether coordinators are made with their tensors in S3."""
    return chosen.blobs == "s3"


needs_disk = pytest.mark.skipif("config.getoption('--blobs') == 's3'", reason="files are looked at")


def coordinator_config() -> dict[str, Any]:
    """Keys of `config.yaml` for a new coordinator; `setup.init` takes them too."""
    database = {"database_url": chosen.database_url()} if on_postgresql() else {}
    return {**database, **(s3.server().config() if in_s3() else {})}


def init_options() -> list[str]:
    """The same, as options of `coldmerge coordinator init`."""
    found = ["--database", chosen.database_url()] if on_postgresql() else []
    return [*found, *(s3.server().init_options() if in_s3() else [])]


def copy_coordinator(folder: Path, target: Path) -> None:
    """A copy of a coordinator's folder that nobody writes to, with a database of its own."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.sock"))
    config = settings.load(target)
    if config.database_url.startswith("postgresql"):
        copied = chosen.copy_database(config.database_url)
        settings.save(config.model_copy(update={"database_url": copied}), target)


def replica(folder: Path, target: Path, *, ports: Sequence[int] = (0, 0)) -> Path:
    """Another folder of the same coordinator: its database, keys and files, its own addresses."""
    config = settings.load(folder)
    target.mkdir(mode=0o700)
    for name in ("keys", "ca"):
        shutil.copytree(folder / name, target / name)
    for name in ("blobs", "contributions", "uploads"):
        if (folder / name).is_dir():
            (target / name).symlink_to(folder / name)
    api, enrol = (f"127.0.0.1:{port}" for port in ports)
    values = {"database_url": config.database_in(folder), "listen": api, "enrol_listen": enrol}
    settings.save(config.model_copy(update=values), target)
    return target


def query(folder: Path, statement: str, **values: object) -> list[tuple[Any, ...]]:
    """What the database of a coordinator says, served or not."""
    url = settings.load(folder).database_in(folder)
    with closing(Database(url)) as database, database.read() as session:
        return [tuple(row) for row in session.execute(text(statement), values)]
