"""The `data` section of a simulation.

data:
source: digits                # documentation, or a folder of task folders
tasks: [digits-234]           # of the source; without it, the source's own choice
unseen: [digits-789]          # tasks that nobody trains on; [] for none
columns: {text: text, label: label}
partition: {by: dirichlet, alpha: 0.5, minimum: 8}
keeps: {org-03: 0.1}          # of what it was dealt
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from coldmerge_client.training.config import Location, Settings
from coldmerge_simulation.data.partition import Partitioner
from coldmerge_simulation.data.partitioners import ByTask
from coldmerge_simulation.data.registry import partitioner

BUILTIN = ("digits", "documentation")


def _partitioner(given: Any) -> Any:
    if isinstance(given, str):
        given = {"by": given}
    if not isinstance(given, dict):
        return given
    rest = {str(key): value for key, value in given.items()}
    return partitioner(str(rest.pop("by", ByTask.name)), rest)


class Columns(Settings):
    """What the columns are called in a source's files. The text is the trainer's business."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"


class DataConfig(Settings):
    """Which tasks there are, and who gets which examples.

    `source` is `digits`, `documentation` or a folder: of task folders, or one task folder
    with train.jsonl, test.jsonl and perhaps validation.jsonl. With several tasks each
    contributor holds one of them, and the partitioner deals each task to its holders. Those
    named in `keeps` have only that share of their examples, for training and validation.
    """

    source: str = "digits"
    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)
    unseen: tuple[str, ...] | None = None
    columns: Columns = Columns()
    partition: Annotated[SerializeAsAny[Partitioner], BeforeValidator(_partitioner)] = ByTask()
    keeps: Mapping[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)

    @field_validator("source")
    @classmethod
    def _place(cls, value: str, info: ValidationInfo) -> str:
        """A folder is relative to the file that names it."""
        if value in BUILTIN:
            return value
        return str(_Place.model_validate({"at": value}, context=info.context).at)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = sorted(set(self.tasks or ()) & set(self.unseen or ()))
        if both:
            raise ValueError(f"{both[0]} is both in tasks and in unseen")
        for names in (self.tasks or (), self.unseen or ()):
            if len(set(names)) < len(names):
                raise ValueError("a task is named twice")
        return self


class _Place(Settings):
    at: Location
