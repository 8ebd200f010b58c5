"""The training configuration of one model: what a contributor writes in YAML.

    trainer: sequence-classification      # token-classification, causal-lm, module:function
    data:
      train: data/                        # a file, or a folder with train.* and validation.*
      columns: {text: sentence, label: topic}
    method: lora                          # or full
    epochs: 2
    freeze: ["embeddings.*", "encoder.layer.[0-3].*"]

Paths are relative to the file they stand in. Tensor patterns are matched against the
names of the release (`*` also matches dots).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from coldmerge.core import yaml_file
from coldmerge.core.errors import ConfigError
from coldmerge.core.validation import first_problem


def _below_the_file(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path.cwd())
    try:
        return Path(folder) / path.expanduser()
    except RuntimeError as error:  # of a user that there is not
        raise ValueError(f"{path} has no home folder") from error


Location = Annotated[Path, AfterValidator(_below_the_file)]


class Settings(BaseModel):
    """Base of the sections: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Settings):
    """What the columns are called in the data.

    `text_pair` is used when it is named here, or when the data has a column of that name.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "tags"


class DataConfig(Settings):
    """Where the private data is. Without a validation file a fixed share is held out.

    `labels` names all labels where the training data need not show each of them; integer
    labels in the data are then positions in it.
    """

    train: Location
    validation: Location | None = None
    columns: Columns = Columns()
    labels: tuple[str, ...] | None = None
    holdout: float = Field(default=0.2, gt=0, lt=1)


class LoraConfig(Settings):
    """PEFT's LoRA. Without `target_modules` PEFT's choice for the architecture is taken."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None
    rslora: bool = False


class SamConfig(Settings):
    """Sharpness-aware minimization (arXiv 2010.01412); `rho` is how far it looks for the worst."""

    rho: float = Field(default=0.05, gt=0, le=10)


class EvaluateConfig(Settings):
    """The paired evaluation at home. The caps keep it quick on large data.

    `max_tokens` bounds the items of token tasks; `after_training` also scores the tuned
    model with its own head.
    """

    max_examples: int = Field(default=2000, ge=2)
    max_tokens: int = Field(default=20_000, ge=2)
    after_training: bool = True


class TrainConfig(Settings):
    """One model's training at home. See the module's docstring for an example.

    `pooling: mean` puts a linear head on the mean of the states, which is right for sentence
    encoders, in place of the head that transformers has for the architecture. `head_lr`
    defaults to ten times `lr`. With `sam` each step takes two passes. A checkpoint to resume
    from is written every `checkpoint_minutes` (0: after each step; null: never). `threads`
    bounds torch's threads. `options` is for trainers of your own.
    """

    trainer: str = "sequence-classification"
    data: DataConfig
    pooling: Literal["model", "mean"] = "model"
    method: Literal["full", "lora"] = "full"
    lora: LoraConfig = LoraConfig()
    sam: SamConfig | None = None
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=5e-5, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    max_length: int = Field(default=128, ge=4)
    max_examples: int | None = Field(default=None, ge=2)
    freeze: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    bf16: Literal["auto"] | bool = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float | None = Field(default=10.0, ge=0)
    evaluate: EvaluateConfig = EvaluateConfig()
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any, info: ValidationInfo) -> Any:
        """`data: folder` stands for `data: {train: folder}`; a trainer's file is made absolute."""
        if not isinstance(raw, dict):
            return raw
        found = dict(raw)
        if isinstance(found.get("data"), str | Path):
            found["data"] = {"train": found["data"]}
        file, colon, function = str(found.get("trainer", "")).rpartition(":")
        if colon and file.endswith(".py"):
            found["trainer"] = f"{_below_the_file(Path(file), info)}:{function}"
        return found

    @property
    def head_rate(self) -> float:
        """Learning rate of the private head."""
        return self.head_lr if self.head_lr is not None else 10 * self.lr

    @classmethod
    def parse(cls, raw: object, folder: Path | None = None) -> Self:
        """Check settings that came as plain values; paths are relative to `folder`.

        Raises:
            ConfigError: naming the first key that is wrong.
        """
        try:
            return cls.model_validate(raw, context={"folder": folder or Path.cwd()})
        except ValidationError as error:
            problem = first_problem(error, "the file")
            raise ConfigError(
                "training.bad_config",
                f"The training configuration is wrong at {problem.key}: {problem.text}.",
                got=problem.got,
                hint="docs/training.md lists every key with its default.",
                folder=folder,
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: the file is missing, not YAML, or has a wrong key.
        """
        try:
            raw = yaml_file.load(path)
        except FileNotFoundError as error:
            raise ConfigError(
                "training.no_config",
                "There is no training configuration for this model.",
                hint="Write one: `trainer: sequence-classification` and `data: FOLDER` suffice.",
                path=path,
            ) from error
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                "training.not_yaml",
                f"The training configuration is not YAML: {str(error).splitlines()[0]}.",
                hint="Check the indentation and the quotes.",
                path=path,
            ) from error
        return cls.parse(raw, path.resolve().parent)
