"""The protocol of a trainer, and how one is found by its name in the configuration."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from coldmerge.core.documents import Statistic
from coldmerge.core.errors import ConfigError
from coldmerge.core.progress import Progress, silent
from coldmerge_client.training.config import TrainConfig

BUILTIN = {
    "causal-lm": "coldmerge_client.training.causal_lm:create",
    "sequence-classification": "coldmerge_client.training.sequence_classification:create",
    "token-classification": "coldmerge_client.training.token_classification:create",
}
"""Short names of the trainers that come with coldmerge, as `module:function`."""


@dataclass(frozen=True)
class TrainJob:
    """Fine-tune `release` (a Hugging Face folder) into `out`, which is this job's own folder.

    `head` is the private head of the last round. `private` are the model's private tensor
    patterns. `digest` is the release's content digest; without it the files are hashed.
    `cache` is a folder of the home where what frozen layers compute is kept between rounds.
    The same job again gives the same tensors, and resumes what an interrupted one left.
    """

    release: Path
    out: Path
    head: Path | None
    config: TrainConfig
    seed: int
    private: tuple[str, ...] = ()
    digest: str | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Trained:
    """A tuned Hugging Face folder (or PEFT adapter folder), and the head that stays here."""

    folder: Path
    head: Path | None
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateJob:
    """Predict on the validation data with a seeded probe on `release`, whatever the head.

    `cache` is a folder of the home for features, which are as private as the texts; it is
    used when `digest`, the release's content digest, is known too.
    """

    release: Path
    config: TrainConfig
    seed: int
    cache: Path | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Predictions:
    """One label and one prediction per item, both int64 [n], items in a fixed order.

    `loss` is the mean negative log-likelihood of the labels, `entropy` the mean entropy of what
    was predicted, both in nats an item: for rounds that learn coefficients. A trainer of one's own
    may leave them out, and then takes no part in that.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    loss: float | None = None
    entropy: float | None = None


class Trainer(Protocol):
    """What `module:function` must return when it is called with the configuration."""

    def train(self, job: TrainJob, progress: Progress = silent) -> Trained:
        """Fine-tune at home; called again for a job that was interrupted."""
        ...

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """Predict the validation labels; base and candidate must get the same items."""
        ...


class Measures(Protocol):
    """What a trainer may have besides, for rounds whose merge method needs statistics."""

    def measure(
        self,
        job: TrainJob,
        trained: Trained,
        kinds: Collection[Statistic],
        progress: Progress = silent,
    ) -> None:
        """Measure statistics of the job's training data through `trained`.

        They go to `statistics/` in `trained.folder`, as `coldmerge.core.statistics` says.
        """
        ...


def measuring(trainer: Trainer, config: TrainConfig) -> Measures:
    """`trainer`, if it can measure.

    Raises:
        ConfigError: it cannot.
    """
    if not callable(getattr(trainer, "measure", None)):
        raise ConfigError(
            "training.cannot_measure",
            f"The trainer {config.trainer} does not measure the statistics that the round needs.",
            expected="a trainer with the method `measure`",
            got=type(trainer).__name__,
            hint="See coldmerge_client.training.Measures for what it has to do.",
        )
    return cast("Measures", trainer)


class Slopes(Protocol):
    """What a trainer may have besides, for rounds that learn coefficients from slopes."""

    def gradient(
        self, job: EvaluateJob, objective: str, progress: Progress = silent
    ) -> Mapping[str, NDArray[np.float32]]:
        """How `objective` (`loss` or `entropy`, as `predict` gives it) changes with the release.

        By the release's names of tensors, each in its shape; those left out change nothing.
        """
        ...


def sloping(trainer: Trainer, config: TrainConfig) -> Slopes:
    """`trainer`, if it has slopes.

    Raises:
        ConfigError: it has none.
    """
    if not callable(getattr(trainer, "gradient", None)):
        raise ConfigError(
            "training.no_slopes",
            f"The trainer {config.trainer} gives no slopes, which the round asks for.",
            expected="a trainer with the method `gradient`",
            got=type(trainer).__name__,
            hint="See coldmerge_client.training.Slopes for what it has to do; our numbers count "
            "without them.",
        )
    return cast("Slopes", trainer)


def load_trainer(config: TrainConfig) -> Trainer:
    """The trainer that `config.trainer` names.

    Raises:
        ConfigError: no such name, module or function, or it does not return a trainer.
    """
    place = BUILTIN.get(config.trainer, config.trainer)
    module, colon, name = place.rpartition(":")
    if not (colon and module and name):
        raise ConfigError(
            "training.unknown_trainer",
            f"There is no trainer called {config.trainer}.",
            expected=", ".join(sorted(BUILTIN)) + ", module:function or file.py:function",
            got=config.trainer,
            hint="Correct `trainer` in the training configuration.",
        )
    create = getattr(_module(module), name, None)
    trainer = create(config) if callable(create) else None
    if not all(callable(getattr(trainer, verb, None)) for verb in ("train", "predict")):
        raise ConfigError(
            "training.not_a_trainer",
            f"{config.trainer} does not give a trainer.",
            expected="a function of the configuration; its result has train and predict",
            got=type(trainer).__name__ if callable(create) else "no such function",
            hint="See coldmerge_client.training.Trainer for the protocol.",
        )
    return cast("Trainer", trainer)


def _module(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name)
        spec = importlib.util.spec_from_file_location(f"coldmerge_trainer_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} cannot be loaded")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in _TRAINING_EXTRA:
            raise ConfigError(
                "training.missing_extra",
                f"Training needs the package {error.name}.",
                hint="Run `pip install 'coldmerge[client]'`.",
            ) from error
        raise ConfigError(
            "training.no_module",
            f"The trainer's module {name} cannot be imported: {error}.",
            hint="Install the module, or name its file as path/to/file.py:function.",
        ) from error


_TRAINING_EXTRA = frozenset(
    {"accelerate", "datasets", "peft", "pyarrow", "sklearn", "torch", "transformers"}
)
