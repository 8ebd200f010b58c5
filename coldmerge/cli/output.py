"""What commands print: tables and progress for people, JSON for scripts."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from coldmerge.core import progress as library
from coldmerge.core.errors import ColdmergeError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_IN_BYTES = {"compare", "download", "export", "hash", "import", "merge", "upload", "write"}


class Format(StrEnum):
    """How a command answers."""

    TABLE = "table"
    JSON = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="`table` for people, `json` for scripts.")
]

PIPE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, which have no width of their own."""

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, soft_wrap=True)


def print_json(value: object) -> None:
    """One JSON value on standard output; times are RFC 3339."""
    sys.stdout.write(json.dumps(value, indent=2, default=_jsonable) + "\n")


def _jsonable(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def print_rows(rows: Sequence[Mapping[str, object]], fmt: Format, *, empty: str) -> None:
    """A table (or a JSON array) with one line per row; `empty` is said when there is none."""
    if fmt is Format.JSON:
        print_json(list(rows))
        return
    if not rows:
        out.print(empty)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(_shortened(value)) for value in row.values()))
    out.print(table)


def _shortened(value: object) -> object:
    """Digests and times of a table's cells; a record shows them whole."""
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    if isinstance(value, str) and _TIME.fullmatch(value):
        return f"{value[:10]} {value[11:19]} UTC"
    return value


def print_record(record: Mapping[str, object], fmt: Format) -> None:
    """One thing, a line per field."""
    if fmt is Format.JSON:
        print_json(dict(record))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in record.items():
        table.add_row(key.replace("_", " "), _cell(value))
    out.print(table)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value) or "–"
    return escape(str(value))


def when(message: Any, field: str) -> str | None:
    """A message's time in RFC 3339; None when it is not set."""
    return getattr(message, field).ToJsonString() if message.HasField(field) else None


def size(nbytes: int) -> str:
    """A number of bytes as people read it, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@contextmanager
def bars(fmt: Format) -> Iterator[library.Progress]:
    """Progress bars on standard error, one per step, bytes where a step counts bytes.

    Yields the callback `(step, done, total)` that the libraries report to. Nothing is
    drawn for scripts.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    shown = fmt is Format.TABLE and err.is_terminal
    with Progress(*columns, console=err, disable=not shown, transient=True) as progress:
        tasks: dict[str, TaskID] = {}
        started: dict[str, float] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks or done == 0:
                if step in tasks:
                    progress.remove_task(tasks[step])
                tasks[step] = progress.add_task(step, total=total, amount="")
                started[step] = time.monotonic()
            seconds = max(time.monotonic() - started[step], 1e-3)
            amount = f"{done}/{total}"
            if step in _IN_BYTES:
                amount = f"{size(done)}/{size(total)} {size(int(done / seconds))}/s"
            progress.update(tasks[step], completed=done, total=total, amount=amount)

        yield update


def fail(error: ColdmergeError, fmt: Format) -> int:
    """Say what went wrong (JSON on standard output if asked) and return the exit status."""
    if fmt is Format.JSON:
        print_json({"error": error.as_dict()})
    message = escape(error.message)
    err.print(f"[bold red]error:[/bold red] {message} [dim]\\[{error.code}][/dim]")
    for key, value in error.ids.items():
        err.print(f"  {key}: {value}", markup=False, highlight=False)
    if error.expected is not None:
        err.print(f"  expected: {error.expected}", markup=False, highlight=False)
    if error.got is not None:
        err.print(f"  got: {error.got}", markup=False, highlight=False)
    err.print(f"  [bold]hint:[/bold] {escape(error.hint)}", highlight=False)
    return error.exit_status
