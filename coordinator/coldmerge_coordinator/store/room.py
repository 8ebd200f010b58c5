"""Disk that must be free before work starts: better no start than half a result."""

from __future__ import annotations

import shutil
from pathlib import Path

from coldmerge.core.errors import ResourceError


def check_room(folder: Path, needed: int, what: str) -> None:
    """Make sure that `needed` bytes are free where `folder` is.

    Raises:
        ResourceError: they are not: "… is too small for `what`".
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            "disk.too_small",
            f"The coordinator's disk is too small for {what}.",
            expected=f"{needed} bytes free",
            got=f"{free} bytes",
            hint="The admin must free some space (`df -h`); then it goes on, or can be repeated.",
        )
