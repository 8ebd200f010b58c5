"""Files that are either there whole or not there, also after a crash."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coldmerge.core.errors import ConflictError, IntegrityError, ResourceError
from coldmerge.core.files import fsync_path, make_folder, raise_if_full


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data` in one durable step; nobody but the owner reads it by default."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise_if_full(error)
        raise
    temporary.replace(path)
    fsync_path(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON with `write_atomic`."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object written by `write_json`.

    Raises:
        IntegrityError: the file is not a JSON object any more.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise IntegrityError(
            "home.damaged_file",
            f"{path} is not a JSON object any more.",
            hint="Something other than coldmerge wrote to it; restore it from a backup.",
            path=path,
        )
    return value


@contextmanager
def exclusive(path: Path, what: str, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path`; it ends with the process, however that ends.

    Raises:
        ConflictError: another process holds it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConflictError(
                "home.locked",
                f"Another coldmerge process is busy with {what}.",
                hint="Wait for it to end, or end it, and run the command again.",
                lock=path,
            ) from error
        yield
    finally:
        os.close(handle)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        ResourceError: the disk of `folder` has less than `needed` bytes free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            "disk.too_small",
            f"The disk is too small for {what}.",
            expected=f"{needed} bytes free",
            got=f"{free} bytes free",
            hint="Free some space, or put COLDMERGE_HOME on a larger disk.",
            folder=folder,
        )
