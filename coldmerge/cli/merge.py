"""`coldmerge merge`, `methods`: merging models on this machine."""

from __future__ import annotations

import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldmerge.cli.output import (
    Format,
    FormatOption,
    bars,
    err,
    out,
    print_json,
    print_record,
    print_rows,
    size,
)

if TYPE_CHECKING:
    from coldmerge.core.digests import Content
    from coldmerge.core.progress import Progress
    from coldmerge.merging.folder import Engine
    from coldmerge.merging.plan import Opened, Plan

PANEL = "Merging"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(B|kB|KB|MB|GB|TB)?")
_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class EngineName(StrEnum):
    """Where the work is done."""

    LOCAL = "local"
    RAY = "ray"


class Vocabulary(StrEnum):
    """Whose vocabulary the merged model has."""

    BASE = "base"


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.command(
        epilog="Example: coldmerge merge plan.yaml merged --models ~/models",
        rich_help_panel=PANEL,
    )(merge)
    app.command(epilog="Example: coldmerge methods ties", rich_help_panel=PANEL)(methods)


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    count = float(found[1]) * _UNITS[found[2] or ""] if found else 0.0
    if not 1 <= count < 2**63:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB or 500MB")
    return int(count)


def merge(
    plan: Annotated[Path, typer.Argument(help="What to merge and how, in mergekit's YAML.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.")],
    models: Annotated[
        Path | None,
        typer.Option(help="A folder of models; the plan's `owner/name` is looked for in it."),
    ] = None,
    vocabulary: Annotated[
        Vocabulary | None,
        typer.Option(help="Match rows of different vocabularies by token, onto the base's."),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of the result, such as 500MB.")
    ] = "5GB",
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many to use. Default: one per processor.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="This machine, or the Ray cluster at RAY_ADDRESS.")
    ] = EngineName.LOCAL,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")
    ] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Merge models as a plan says, into a new model folder."""
    from coldmerge.core.files import existing
    from coldmerge.merging.plan import Opened, load, run

    largest = _bytes(shard_size)
    read = load(plan)
    scratch = existing(folder.absolute().parent) if engine is EngineName.RAY else None
    with (
        bars(fmt) as progress,
        Opened(
            read, models, scratch=scratch, by_token=vocabulary is not None, progress=progress
        ) as opened,
    ):
        for note in opened.notes:
            err.print(f"note: {note}", highlight=False, markup=False)
        if dry_run:
            _show_estimate(read, opened, folder, threads, fmt)
        elif read.makes_adapter:
            _merge_adapters(read, opened, folder, fmt, progress)
        else:
            content = run(
                read,
                opened,
                folder,
                threads=threads,
                max_shard_bytes=largest,
                engine=_engine(engine),
                extra_files={"README.md": _card(read, opened, folder).encode()},
                progress=progress,
            )
            _show_result(read, opened, folder, content, fmt)


def _merge_adapters(
    plan: Plan, opened: Opened, folder: Path, fmt: Format, progress: Progress
) -> None:
    from coldmerge.core.adapters import WEIGHTS
    from coldmerge.core.digests import file_digest
    from coldmerge.merging.plan.adapters import run_adapters

    found = run_adapters(plan, opened, folder, progress=progress)
    digest, nbytes = file_digest(folder / WEIGHTS)
    print_record(
        {
            "folder": str(folder),
            "method": plan.method.name,
            "inputs": [item.label for item in opened.inputs],
            "tensors": len(found.tensors),
            "rank": max(one.rank for one in found.tensors),
            "relative_error": found.relative_error,
            "bytes": nbytes if fmt is Format.JSON else size(nbytes),
            "sha256": digest,
        },
        fmt,
    )


def _engine(name: EngineName) -> Engine | None:
    if name is EngineName.LOCAL:
        return None
    from coldmerge.merging.on_ray import on_ray

    return on_ray


def _card(plan: Plan, opened: Opened, folder: Path) -> str:
    from coldmerge import __version__
    from coldmerge.core.dtypes import FLOATS
    from coldmerge.core.errors import CheckpointError
    from coldmerge.merging.plan.describe import describe
    from coldmerge.report.merge_card import MergeFacts, merge_card

    tensors = opened.base.tensors.values()
    try:
        kind = opened.base.config.get("model_type")
    except CheckpointError:
        kind = None
    types = {spec.dtype for spec in tensors if spec.dtype in FLOATS}
    return merge_card(
        MergeFacts(
            name=folder.absolute().name,
            method=plan.method.name,
            paper=describe(plan.method).paper,
            base=plan.base.name if plan.base else None,
            inputs=[item.label for item in opened.inputs],
            recipe=plan.text,
            parameters=sum(spec.size for spec in tensors if spec.dtype in FLOATS),
            dtype=plan.dtype or ", ".join(sorted(types)),
            model_type=kind if isinstance(kind, str) else None,
            notes=opened.notes,
            version=__version__,
        )
    )


def _show_result(plan: Plan, opened: Opened, folder: Path, content: Content, fmt: Format) -> None:
    record: dict[str, Any] = {
        "folder": str(folder),
        "method": plan.method.name,
        "inputs": [item.label for item in opened.inputs],
        "tensors": len(content.tensors),
        "bytes": sum(entry.nbytes for entry in content.tensors),
        "digest": content.digest,
    }
    if fmt is Format.JSON:
        record["notes"] = opened.notes
    else:
        record["bytes"] = size(record["bytes"])
    print_record(record, fmt)


def _show_estimate(
    plan: Plan, opened: Opened, folder: Path, threads: int | None, fmt: Format
) -> None:
    from coldmerge.merging.plan.estimate import estimate

    found = estimate(plan, opened, folder, threads)
    record: dict[str, Any] = {
        "method": plan.method.name,
        "inputs": [item.label for item in opened.inputs],
        **asdict(found),
    }
    if fmt is Format.JSON:
        print_json({**record, "notes": opened.notes})
        return
    for key in ("bytes_read", "bytes_written", "bytes_free", "memory_bytes"):
        record[key] = size(record[key])
    record["memory"] = f"about {record.pop('memory_bytes')}"
    record["time"] = f"about {found.seconds:.3g} s"
    del record["seconds"]
    print_record(record, fmt)
    out.print("Memory and time are estimates, from merging a small piece of it.")


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method; its parameters are shown.")
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """List the merge methods, or the parameters of one."""
    from coldmerge.merging.plan import describe

    if name is None:
        rows = [{"method": m.name, "what": m.paper} for m in describe.methods()]
        print_rows(rows, fmt, empty="There is no merge method.")
        return
    method = describe.method_class(name)
    if fmt is Format.JSON:
        print_json(describe.schema(method))
        return
    found = describe.describe(method)
    print_record(
        {
            "method": found.name,
            "paper": found.paper,
            "details": found.details,
            "base": found.base,
            "scope": found.scope,
            "cut": found.cut,
            "inputs must ship": found.needs,
        },
        fmt,
    )
    out.print()
    table: list[dict[str, object]] = [
        {
            "parameter": p.word,
            "of": "each model" if p.per_input else "the merge",
            "type": p.kind,
            "range": p.range,
            "default": "required" if p.required else p.default,
            "meaning": p.meaning,
        }
        for p in found.parameters
    ]
    print_rows(table, fmt, empty="It has no parameters.")
