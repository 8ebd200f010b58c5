"""Carrying a plan out: from its file to a model folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from coldmerge.core.checkpoint_writer import MAX_SHARD_BYTES
from coldmerge.core.digests import Content
from coldmerge.core.dtypes import FLOATS
from coldmerge.core.progress import Progress, silent
from coldmerge.merging.folder import Engine, merge
from coldmerge.merging.plan.inputs import Opened
from coldmerge.merging.plan.parameters import settings
from coldmerge.merging.plan.plan import Plan


def run(
    plan: Plan,
    opened: Opened,
    out: Path | str,
    *,
    threads: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    engine: Engine | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress = silent,
) -> Content:
    """Merge what `opened` holds into the folder `out`, and give what its digest names.

    The bytes depend neither on `threads` nor on `engine`.

    Raises:
        ConfigError: a parameter is unusable; with the line.
        TaskVectorError: an input does not fit, or holds NaN.
        ConflictError: `out` exists and is not empty.
        ResourceError: the disk is too small.
    """
    names = [name for name, spec in opened.base.tensors.items() if spec.dtype in FLOATS]
    recipe = settings(plan, opened.places, names)
    remove_leftovers(Path(out))
    return merge(
        opened.base,
        opened.inputs,
        recipe,
        out,
        threads=threads,
        dtype=plan.dtype,
        max_shard_bytes=max_shard_bytes,
        extra_files=extra_files,
        engine=engine,
        progress=progress,
    )


def remove_leftovers(out: Path) -> None:
    """Remove what killed processes of this machine left of unfinished merges into `out`."""
    pattern = re.compile(re.escape(out.name) + r"\.partial-(\d+)")
    if out.absolute().parent.is_dir():
        for path in sorted(out.absolute().parent.iterdir()):
            found = pattern.fullmatch(path.name)
            if found and not _alive(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True
