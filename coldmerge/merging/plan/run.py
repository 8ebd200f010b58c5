"""Carrying a plan out: from its file to a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coldmerge.core.checkpoint_writer import MAX_SHARD_BYTES
from coldmerge.core.digests import Content
from coldmerge.core.dtypes import FLOATS
from coldmerge.core.errors import ConfigError
from coldmerge.core.files import remove_leftovers
from coldmerge.core.progress import Progress, silent
from coldmerge.merging.folder import Engine, merge
from coldmerge.merging.plan.inputs import Opened
from coldmerge.merging.plan.outputs import chat_template, configuration
from coldmerge.merging.plan.parameters import Settings, settings
from coldmerge.merging.plan.plan import Plan
from coldmerge.merging.shipped import check_shipped


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
    prepared = recipe(plan, opened)
    files = {
        **configuration(opened.base, plan.dtype),
        **chat_template(plan.chat_template, opened.folders),
        **(extra_files or {}),
    }
    remove_leftovers(Path(out))
    return merge(
        opened.base,
        opened.inputs,
        prepared,
        out,
        threads=threads,
        dtype=plan.dtype,
        max_shard_bytes=max_shard_bytes,
        extra_files=files,
        engine=engine,
        progress=progress,
    )


def recipe(plan: Plan, opened: Opened) -> Settings:
    """How every float tensor of the base is merged.

    Raises:
        ConfigError: a parameter is unusable, the method takes another number of inputs, or an
            input lacks a statistic that the method needs; with the line.
    """
    names = [name for name, spec in opened.base.tensors.items() if spec.dtype in FLOATS]
    found = settings(plan, opened.places, names)
    kinds: dict[str, list[str]] = {}
    for name, setting in found.table.items():
        for kind in setting.merger.needs:
            kinds.setdefault(kind, []).append(name)
    try:
        for merger in {setting.merger for setting in found.table.values()}:
            merger.check_inputs(len(opened.inputs))
        for kind, needing in sorted(kinds.items()):
            check_shipped(opened.inputs, needing, kind)
    except ConfigError as error:
        raise ConfigError(
            "plan.inputs_do_not_fit",
            f"{plan.method_at}: {error.message}",
            expected=error.expected,
            got=error.got,
            hint=error.hint,
            at=plan.method_at,
        ) from error
    return found
