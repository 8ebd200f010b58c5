"""Fine-tuning a pulled release at home, once, and keeping the private head."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from coldmerge.core.documents import Statistic
from coldmerge.core.errors import NotFoundError
from coldmerge.core.files import fsync_path
from coldmerge.core.progress import Progress, silent
from coldmerge.core.statistics import FOLDER, Measured
from coldmerge_client.files import exclusive, read_json, write_json
from coldmerge_client.home import Home
from coldmerge_client.pull import Pulled
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import Trained, TrainJob, load_trainer, measuring


def train(
    home: Home,
    base: Pulled,
    config: TrainConfig,
    *,
    statistics: Collection[Statistic] = (),
    progress: Progress = silent,
) -> Trained:
    """Fine-tune `base` by `config`; the same again answers at once, an interrupted one resumes.

    The private head is kept in the home folder and starts the next training. Each release
    is trained from with a seed of its own, so that `max_examples` draws afresh. `statistics`
    are measured afterwards, unless they were before.

    Raises:
        ConflictError: another process trains this model.
        DataError: the training data cannot be used.
        ConfigError: the trainer cannot measure.
    """
    with exclusive(home.lock(f"train-{base.model}"), f"training {base.model}", wait=False):
        trained = finished(home, base, config)
        if trained is None:
            trained = load_trainer(config).train(_job(home, base, config), progress)
            _remember(home, base, config, trained)
        if trained.head is not None:
            _keep_head(trained.head, home.head(base.model))
        if statistics and not _measured(trained, statistics):
            trainer = measuring(load_trainer(config), config)
            trainer.measure(_job(home, base, config), trained, statistics, progress)
        return trained


def _job(home: Home, base: Pulled, config: TrainConfig) -> TrainJob:
    head = home.head(base.model)
    return TrainJob(
        release=base.folder,
        out=_folder(home, base) / "run",
        head=head if head.exists() else None,
        config=config,
        seed=config.seed + (base.number or 0),
        private=base.private,
        digest=base.digest,
        cache=home.cache / "features",
    )


def _measured(trained: Trained, statistics: Collection[Statistic]) -> bool:
    try:
        Measured.open(trained.folder / FOLDER, statistics)
    except NotFoundError:
        return False
    return True


def finished(home: Home, base: Pulled, config: TrainConfig | None = None) -> Trained | None:
    """The finished fine-tune of `base` (by `config`, when given), if there is one."""
    return finished_at(home, base.model, base.digest, config)


def finished_at(
    home: Home, model: str, digest: str, config: TrainConfig | None = None
) -> Trained | None:
    """The same of the release of that digest, which need not be on the disk any more."""
    path = _folder_at(home, model, digest) / "trained.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    if not found or (config and found["config"] != config.model_dump(mode="json")):
        return None
    folder, head = Path(found["folder"]), found["head"]
    if not folder.exists():
        return None
    return Trained(
        folder=folder,
        head=Path(head) if head and Path(head).exists() else None,
        examples=found["examples"],
        metrics=found["metrics"],
        training=found["training"],
    )


def forget(home: Home, model: str, *, keep: Pulled | None = None) -> None:
    """Remove the fine-tunes of a model, except those of release `keep`."""
    kept = _folder(home, keep) if keep else None
    work = home.work(model)
    for folder in work.iterdir() if work.is_dir() else ():
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(home: Home, base: Pulled) -> Path:
    return _folder_at(home, base.model, base.digest)


def _folder_at(home: Home, model: str, digest: str) -> Path:
    return home.work(model) / digest[:16]


def _remember(home: Home, base: Pulled, config: TrainConfig, trained: Trained) -> None:
    write_json(
        _folder(home, base) / "trained.json",
        {
            "config": config.model_dump(mode="json"),
            "folder": str(trained.folder),
            "head": str(trained.head) if trained.head else None,
            "examples": trained.examples,
            "metrics": trained.metrics,
            "training": trained.training,
        },
    )


def _keep_head(made: Path, head: Path) -> None:
    """Copy beside, then swap: a crash leaves the old head or the new one."""
    if made.resolve() == head.resolve():
        return
    beside, before = head.with_name(f".{head.name}.new"), head.with_name(f".{head.name}.old")
    for left in (beside, before):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(made, beside)
    if head.exists():
        head.rename(before)
    beside.rename(head)
    fsync_path(head.parent)
    shutil.rmtree(before, ignore_errors=True)
