"""Reading the contributor's files: CSV, TSV, JSON lines and Parquet, never the network."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coldmerge.core.errors import DataError
from coldmerge_client.training.config import DataConfig

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".tsv")

Table = dict[str, list[Any]]
"""Columns by name, all of one length."""


def locate(data: DataConfig) -> tuple[Path, Path | None]:
    """The training and the validation file; the latter None where a share is to be held out.

    Raises:
        DataError: a file or folder does not exist, or a folder has no train file.
    """
    train, validation = data.train, data.validation
    if train.is_dir():
        folder, found = train, _named(train, "train")
        if found is None:
            raise DataError(
                "data.no_train_file",
                f"The folder {folder} has no training file.",
                expected="one of " + ", ".join(f"train{suffix}" for suffix in SUFFIXES),
                got=", ".join(sorted(entry.name for entry in folder.iterdir())[:10]),
                hint="Name the file itself in `data.train`.",
            )
        train, validation = found, validation or _named(folder, "validation")
    for path in (train, validation):
        if path is not None and not path.is_file():
            raise DataError(
                "data.no_file",
                f"There is no data file {path}.",
                hint="Paths in the training configuration are relative to its own folder.",
                path=path,
            )
    return train, validation


def _named(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES]
    return next((path for path in found if path.is_file()), None)


def digest(data: DataConfig) -> str:
    """sha256 over the bytes of the data files and how they are read, as hexadecimal digits."""
    total = hashlib.sha256(data.model_dump_json(exclude={"train", "validation"}).encode())
    for path in locate(data):
        if path is not None:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_table(path: Path, scratch: Path | None = None) -> Table:
    """All columns of one file, in memory.

    `datasets` unpacks through a folder below `scratch` (else the system's temporary
    folder), which only the owner can read and which is gone afterwards.

    Raises:
        DataError: another format, or the file is damaged or empty.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            "data.unknown_format",
            f"{path.name} is in a format that is not read here.",
            expected=", ".join(SUFFIXES),
            got=path.suffix or "no suffix",
            hint="Convert it, for example to JSON lines.",
            path=path,
        )
    if path.stat().st_size == 0:
        raise empty(path)
    from datasets.exceptions import DatasetGenerationError

    try:
        with _folder(scratch) as folder:
            return _read(path, folder)
    except (DatasetGenerationError, ValueError, OSError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        raise DataError(
            "data.unreadable",
            f"{path.name} cannot be read as {path.suffix[1:].upper()} ({type(cause).__name__}).",
            hint="Check its rows: the same keys and kinds of value in each, UTF-8 throughout.",
            path=path,
        ) from error


def _read(path: Path, folder: str) -> Table:
    import datasets

    keep: dict[str, Any] = {"cache_dir": folder, "keep_in_memory": True}
    suffix = path.suffix.lower()
    with _no_bars():
        if suffix == ".parquet":
            dataset = datasets.Dataset.from_parquet(str(path), **keep)
        elif suffix in (".json", ".jsonl"):
            dataset = datasets.Dataset.from_json(str(path), **keep)
        else:
            # "null" and "NA" are words too: nothing but the empty cell counts as missing.
            separator = "\t" if suffix == ".tsv" else ","
            dataset = datasets.Dataset.from_csv(
                str(path), sep=separator, keep_default_na=False, **keep
            )
    return {name: list(dataset[name]) for name in dataset.column_names}


@contextlib.contextmanager
def _folder(scratch: Path | None) -> Iterator[str]:
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="coldmerge-", dir=scratch) as folder:
        yield folder


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from datasets.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def column(table: Table, name: str, path: Path) -> list[Any]:
    """One column.

    Raises:
        DataError: it is not there; the message lists those that are.
    """
    if name not in table:
        raise DataError(
            "data.missing_column",
            f"{path.name} has no column {name}.",
            expected=name,
            got=", ".join(table) or "no columns",
            hint="Map it in the training configuration: `data: {columns: {text: …, label: …}}`.",
            path=path,
        )
    return table[name]


def empty(path: Path) -> DataError:
    """The error for a file without a single usable example."""
    return DataError(
        "data.empty",
        f"{path.name} has no usable example.",
        expected="rows with a text that is not empty",
        hint="Check the file, and which column the configuration takes the text from.",
        path=path,
    )
