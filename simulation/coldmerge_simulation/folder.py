"""The folder of a run: where everything of a simulation lies, and what was written down whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.core.files import fsync_path

CONFIG = "simulation.json"
JOURNAL = "rounds.jsonl"
LOCK = "lock"


@dataclass(frozen=True)
class RunFolder:
    """```
    RUN/simulation.json  base/  data/<contributor>/  hub/  homes/<contributor>/  models/<digest>/
        outbox/<round>/  rounds.jsonl  round.json  progress.json  scores.json
    ```

    `hub` is a coordinator's folder. `models` holds the model folders that are worked on.
    """

    path: Path

    @property
    def base(self) -> Path:
        """The model folder that became release 0."""
        return self.path / "base"

    @property
    def data(self) -> Path:
        """The contributors' data, a folder each."""
        return self.path / "data"

    @property
    def hub(self) -> Path:
        """The embedded coordinator."""
        return self.path / "hub"

    @property
    def homes(self) -> Path:
        """What stays with the contributors, a folder each."""
        return self.path / "homes"

    @property
    def models(self) -> Path:
        """Releases and candidates as model folders, by content digest."""
        return self.path / "models"

    def outbox(self, round_id: str) -> Path:
        """Where contributors leave what a round has not admitted yet."""
        return self.path / "outbox" / round_id

    def config(self) -> dict[str, Any]:
        """What `simulation.json` says.

        Raises:
            NotFoundError: there is no run in this folder.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / CONFIG).read_text())
        except FileNotFoundError as error:
            raise NotFoundError(
                "simulation.no_run",
                f"There is no simulation in {self.path}.",
                expected=f"a file {CONFIG}",
                hint="Start one with `coldmerge simulate CONFIG --out DIR`.",
            ) from error
        return found

    def write(self, name: str, value: object) -> None:
        """Replace a JSON file, whole or not at all."""
        replace_file(self.path / name, json.dumps(value, indent=1, sort_keys=True).encode())

    def read(self, name: str) -> Any:
        """A JSON file; None where there is none."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None

    def journal(self) -> list[dict[str, Any]]:
        """The rounds that ended; half a line, as a crash leaves it, is no round."""
        try:
            lines = (self.path / JOURNAL).read_text().split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1]]

    def note(self, entry: dict[str, Any]) -> None:
        """Append a round to the journal, after cutting off half a line."""
        path = self.path / JOURNAL
        whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(len(whole[0]) + len(whole[1]))
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this is held no other process drives the run.

        Raises:
            ConflictError: another one does.
        """
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(
                    "simulation.running",
                    f"Another process runs the simulation in {self.path}.",
                    hint="Wait for it, or choose another folder with --out.",
                ) from error
            yield
        finally:
            os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    fsync_path(beside)
    beside.rename(path)
