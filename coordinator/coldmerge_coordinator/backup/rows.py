"""Rows of a table as JSON lines, the same whichever database they come from or go to."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Column, DateTime, LargeBinary, Table, insert, select
from sqlalchemy.orm import Session

from coldmerge.core.errors import IntegrityError
from coldmerge.core.files import fsync_path

BATCH = 500


def write_rows(session: Session, table: Table, path: Path) -> int:
    """Write all rows of `table`, in the order of its primary key: how many."""
    count = 0
    query = select(table).order_by(*table.primary_key.columns)
    with path.open("w", encoding="utf-8") as file:
        for row in session.execute(query.execution_options(yield_per=BATCH)).mappings():
            values = {column.name: _plain(row[column]) for column in table.columns}
            file.write(json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n")
            count += 1
    fsync_path(path)
    return count


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def read_rows(session: Session, table: Table, path: Path) -> int:
    """Insert the rows that `write_rows` wrote into the empty `table`: how many.

    A column that the rows do not have yet gets its default, or nothing.

    Raises:
        IntegrityError: a line is not a row of this table.
    """
    for column in table.columns:
        if isinstance(column.type, JSON):
            column.type.none_as_null = True
    count = 0
    for batch in _batches(table, path):
        session.execute(insert(table), batch)
        count += len(batch)
    return count


def _batches(table: Table, path: Path) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            batch.append(_row(table, path, number, line))
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _row(table: Table, path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return {name: _typed(table.columns[name], value) for name, value in values.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            "backup.bad_row",
            f"A line of the backup is not a row of the table {table.name}.",
            expected=", ".join(column.name for column in table.columns),
            got=str(error)[:200],
            hint="The backup is damaged, or was made by a newer coldmerge: use another.",
            path=path,
            line=number,
        ) from error


def _typed(column: Column[Any], value: Any) -> Any:
    if value is None:
        return None
    if isinstance(column.type, LargeBinary):
        return base64.b64decode(value, validate=True)
    if isinstance(column.type, DateTime):
        return datetime.fromisoformat(value)
    return value
