"""Everybody's data as files, made once: the same configuration and seed give the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldmerge.core.errors import ConfigError, ConflictError, DataError
from coldmerge.demo import folders
from coldmerge.demo.folders import VALIDATION_SHARE, Task
from coldmerge_simulation.data import sources
from coldmerge_simulation.data.config import DataConfig
from coldmerge_simulation.data.partition import LEAST, Parts, Pool, serves
from coldmerge_simulation.data.partitioners import check_room
from coldmerge_simulation.data.sources import Source

INDEX = "shares.json"


@dataclass(frozen=True)
class Share:
    """What one contributor holds: `folder` has train.jsonl and validation.jsonl.

    `examples` and `labels` are of the training part: how many, and how many of each label.
    """

    name: str
    folder: Path
    task: str
    examples: int
    labels: dict[str, int]


@dataclass(frozen=True)
class Shares:
    """Everybody's data, and the tasks on which releases are measured."""

    shares: tuple[Share, ...]
    seen: tuple[Task, ...]
    unseen: tuple[Task, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The contributors, in order."""
        return tuple(share.name for share in self.shares)


def names(contributors: int) -> tuple[str, ...]:
    """What the contributors of a simulation are called: org-01, org-02 and so on."""
    width = len(str(contributors))
    return tuple(f"org-{number:0{width}d}" for number in range(1, contributors + 1))


def make(config: DataConfig, contributors: int, seed: int, folder: Path) -> Shares:
    """Write everybody's data into `folder`, or read what is there for the same settings.

    The contributors are called as `names` says; of T tasks, the n-th contributor holds task n
    modulo T.

    Raises:
        ConfigError: the source has no such task, or a partitioner did not deal properly.
        ConflictError: `folder` holds data of other settings.
        DataError: data cannot be read, or is too little for so many contributors.
    """
    key = _key(config, contributors, seed)
    if not (folder / INDEX).exists():
        seen, unseen = sources.read(config, seed)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        rows = _write(config, seen[:contributors], unseen, contributors, seed, partial)
        (partial / INDEX).write_text(json.dumps({"key": key, "shares": rows}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return _load(folder, key)


def _key(config: DataConfig, contributors: int, seed: int) -> str:
    said = [config.model_dump(mode="json"), contributors, seed]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _load(folder: Path, key: str) -> Shares:
    index = json.loads((folder / INDEX).read_text())
    if index["key"] != key:
        raise ConflictError(
            "simulation.other_data",
            "The run's folder holds the data of another simulation.",
            expected="the settings, the number of contributors and the seed it was made with",
            hint="Give the run another folder, or remove this one.",
            folder=folder,
        )
    shares = tuple(Share(folder=folder / row["name"], **row) for row in index["shares"])

    def tasks(group: str) -> tuple[Task, ...]:
        places = sorted((folder / "tasks" / group).glob("*/*"))
        return tuple(folders.load(place) for place in places)

    return Shares(shares, tasks("seen"), tasks("unseen"))


def _write(
    config: DataConfig,
    seen: Sequence[Source],
    unseen: Sequence[Task],
    contributors: int,
    seed: int,
    folder: Path,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for place, source in enumerate(seen):
        holders = names(contributors)[place :: len(seen)]
        for name, part in zip(holders, _dealt(config, source, holders, seed), strict=True):
            train, validation = _halves(source, part, f"{seed}/{name}")
            for half, lines in (("train", train), ("validation", validation)):
                _write_lines(folder / name / f"{half}.jsonl", lines)
            counts = Counter(str(row["label"]) for row in train)
            about = {"examples": len(train), "labels": dict(sorted(counts.items()))}
            rows.append({"name": name, "task": source.task.name, **about})
    for group, tasks in (("seen", [source.task for source in seen]), ("unseen", unseen)):
        for place, task in enumerate(tasks):
            _whole(task).save(folder / "tasks" / group / f"{place:02d}" / task.name)
    return sorted(rows, key=lambda row: str(row["name"]))


def _dealt(config: DataConfig, source: Source, holders: Sequence[str], seed: int) -> Parts:
    """Positions in the source's training and validation rows, one list for each holder."""
    count = len(holders)
    task, rows = source.task, [*source.train, *source.validation]
    kinds = [example.label for example in (*task.train, *task.validation)]
    if len(set(kinds)) < 2:
        raise _one_class(f"The task {task.name} has examples of one label only")
    pool = Pool(task.name, rows, np.array(kinds, np.int64))
    check_room(pool, count, LEAST)
    name = config.partition.name
    key = hashlib.sha256(f"{seed}/partition/{name}/{task.name}".encode()).digest()
    draw = np.random.default_rng(list(key))
    parts = config.partition.deal(pool, count, draw)
    _check_parts(parts, pool, count, name)
    kept = [
        _kept(config.keeps.get(holder, 1.0), part, pool, len(source.train), f"{seed}/{holder}")
        for holder, part in zip(holders, parts, strict=True)
    ]
    _check_parts(kept, pool, count, name)
    return kept


def _kept(share: float, part: list[int], pool: Pool, border: int, key: str) -> list[int]:
    """That share of a part below and from `border` on, every label of it while there is room."""
    if share == 1:
        return part
    seed = list(hashlib.sha256(f"{key}/keeps".encode()).digest())
    order = np.random.default_rng(seed).permutation(sorted(part)).tolist()
    found: list[int] = []
    for half in ([p for p in order if p < border], [p for p in order if p >= border]):
        first = {int(pool.labels[position]): position for position in reversed(half)}
        wanted = max(1, round(share * len(half)))
        found += list(dict.fromkeys([*sorted(first.values()), *half]))[:wanted]
    return sorted(found)


def _check_parts(parts: Parts, pool: Pool, count: int, name: str) -> None:
    dealt = [position for part in parts for position in part]
    if (
        len(parts) != count
        or len(set(dealt)) != len(dealt)
        or not set(dealt) <= set(range(len(pool.rows)))
    ):
        raise ConfigError(
            "simulation.bad_parts",
            f"The partitioner {name} did not deal {pool.task} properly.",
            expected=f"{count} lists of positions below {len(pool.rows)}, none of them twice",
            got=f"{len(parts)} lists with {len(dealt)} positions, {len(set(dealt))} different",
            hint="Correct the partitioner's `deal`.",
        )
    for part in parts:
        counts = Counter(pool.labels[part].tolist())
        if len(counts) == 1 and len(part) >= LEAST:
            raise _one_class(f"A contributor to {pool.task} would have examples of one label only")
        if not serves(counts):
            raise DataError(
                "simulation.share_too_small",
                f"The partitioner {name} leaves a contributor to {pool.task} too little.",
                expected=f"at least {LEAST} examples for each, two of them of one label",
                got=f"{len(part)} examples of {len(counts)} labels",
                hint="Take fewer contributors, another data.partition, or a larger data.keeps.",
            )


def _one_class(what: str) -> DataError:
    return DataError(
        "simulation.one_class",
        f"{what}: there is nothing to learn.",
        expected="at least two labels for each contributor",
        hint="Take fewer contributors, another data.partition, or other tasks.",
    )


Row = dict[str, Any]


def _halves(source: Source, part: Sequence[int], key: str) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, as the source has them apart; else a fifth is set aside.

    Every label of the validation part is also in the training part, which keeps two of them.
    """
    border = len(source.train)
    train = [source.train[position] for position in part if position < border]
    validation = [source.validation[position - border] for position in part if position >= border]
    known = {str(row["label"]) for row in train}
    train += [row for row in validation if str(row["label"]) not in known]
    validation = [row for row in validation if str(row["label"]) in known]
    return (train, validation) if validation else _set_aside(train, key)


def _set_aside(train: Sequence[Row], key: str) -> tuple[list[Row], list[Row]]:
    """Move a fifth of the rows, but never the last one of a label."""
    seed = list(hashlib.sha256(f"{key}/validation".encode()).digest())
    wanted = max(1, round(VALIDATION_SHARE * len(train)))
    left = Counter(str(row["label"]) for row in train)
    moved: set[int] = set()
    for position in np.random.default_rng(seed).permutation(len(train)).tolist():
        label = str(train[position]["label"])
        if len(moved) < wanted and left[label] > 1:
            left[label] -= 1
            moved.add(position)
    kept = [row for position, row in enumerate(train) if position not in moved]
    return kept, [train[position] for position in sorted(moved)]


def _whole(task: Task) -> Task:
    """The task with a validation part: probes do not look at it, but every task folder has one."""
    if task.validation:
        return task
    return Task(task.name, task.labels, task.train, task.train[:1], task.test)


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
