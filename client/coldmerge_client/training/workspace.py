"""The folder of one training job: what it was asked, how far it is, what came out.

job.json       fingerprint of release, data, head, settings and seed
checkpoints/   to resume from; gone when the job is done
model/         the tuned model or adapter     head/   the private head
result.json    written last: its presence means done
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from coldmerge.core.errors import ConfigError
from coldmerge.core.files import fsync_path
from coldmerge_client.files import read_json, write_json
from coldmerge_client.training import tables
from coldmerge_client.training.trainer import Trained, TrainJob

_ELSEWHERE = {"data", "device", "threads", "checkpoint_minutes"}
"""Settings that do not make another job: the data counts by its bytes."""


def fingerprint(job: TrainJob) -> str:
    """sha256 of everything that decides what the job's result is."""
    body = {
        "config": job.config.model_dump(mode="json", exclude=_ELSEWHERE),
        "data": tables.digest(job.config.data),
        "head": folder_digest(job.head) if job.head and job.head.is_dir() else None,
        "private": sorted(job.private),
        "release": job.digest or folder_digest(job.release),
        "seed": job.seed,
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of the files in `folder`, without its subfolders."""
    total = hashlib.sha256()
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Workspace:
    """One job's folder, claimed for `job`. Another job's leftovers in it are removed."""

    def __init__(self, job: TrainJob) -> None:
        self.path = job.out
        self.checkpoints = job.out / "checkpoints"
        self.scratch = job.out / "scratch"
        self._claim(fingerprint(job))

    def _claim(self, mark: str) -> None:
        claim = self.path / "job.json"
        if not claim.exists() and self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                "training.out_not_empty",
                f"The folder {self.path} holds something other than a training job.",
                expected="an empty folder, or that of an earlier job",
                hint="Name another folder.",
                out=self.path,
            )
        if not claim.exists() or read_json(claim).get("fingerprint") != mark:
            for name in ("result.json", "job.json"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("checkpoints", "model", "head"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            write_json(claim, {"fingerprint": mark})
        shutil.rmtree(self.scratch, ignore_errors=True)

    def result(self) -> Trained | None:
        """What came out, if the job was already finished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        found = read_json(path)
        head = self.path / "head"
        found.update(folder=self.path / "model", head=head if head.is_dir() else None)
        return Trained(**found)

    def write(self, name: str, save: Callable[[Path], None]) -> Path:
        """Let `save` fill a folder, and give it its name once it is whole."""
        partial, place = self.path / f"{name}.partial", self.path / name
        for leftover in (partial, place):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(mode=0o700)
        save(partial)
        partial.rename(place)
        return place

    def finish(self, trained: Trained) -> Trained:
        """Record the result, then drop what was only needed to resume."""
        fsync_path(self.path)
        record = asdict(trained)
        del record["folder"], record["head"]
        write_json(self.path / "result.json", record)
        for leftover in (self.checkpoints, self.scratch):
            shutil.rmtree(leftover, ignore_errors=True)
        return trained
