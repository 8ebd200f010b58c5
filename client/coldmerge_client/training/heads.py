"""The private head: the tensors that are not in the release, and the labels they stand for.

    head.safetensors   the tensors, by the fine-tuned model's own names
    labels.json        task and labels, in the order of the head's outputs

A head never leaves the contributor. It is kept between rounds, and follows its labels
when new ones appear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from coldmerge.core.errors import IntegrityError
from coldmerge_client.files import write_json

TENSORS, LABELS = "head.safetensors", "labels.json"


@dataclass(frozen=True)
class Head:
    """`tensors` by name; `labels` name the rows of those that end in one output per label."""

    task: str
    labels: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]

    def save(self, folder: Path) -> None:
        """Write into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tensors = {name: self.tensors[name].cpu().contiguous() for name in sorted(self.tensors)}
        safetensors.torch.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        write_json(folder / LABELS, {"labels": list(self.labels), "task": self.task})

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Read what `save` wrote.

        Raises:
            IntegrityError: a file is missing or damaged.
        """
        try:
            about = json.loads((folder / LABELS).read_text(encoding="utf-8"))
            tensors = safetensors.torch.load_file(folder / TENSORS)
            return cls(str(about["task"]), tuple(map(str, about["labels"])), tensors)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise IntegrityError(
                "head.damaged",
                f"The private head in {folder} cannot be read ({type(error).__name__}).",
                expected=f"{TENSORS} and {LABELS}",
                hint="Restore the folder from a backup, or remove it to start a fresh head.",
                path=folder,
            ) from error

    def fill(self, parameters: Mapping[str, torch.Tensor], labels: Sequence[str]) -> int:
        """Copy into the model's own tensors, in place; the number of tensors that took it.

        Where a tensor has one row per label, rows move to the place their label has in
        `labels`, and rows of new labels keep their initial values. A tensor of another
        shape (another architecture) is left alone.
        """
        filled = 0
        for name, kept in self.tensors.items():
            target = parameters.get(name)
            if target is None or kept.shape[1:] != target.shape[1:]:
                continue
            if kept.shape[:1] == (len(self.labels),) and target.shape[:1] == (len(labels),):
                rows = [row for row, label in enumerate(self.labels) if label in labels]
                places = [labels.index(self.labels[row]) for row in rows]
                target.data[places] = kept[rows].to(target)
            elif kept.shape == target.shape:
                target.data.copy_(kept)
            else:
                continue
            filled += 1
        return filled


def kept(folder: Path | None, task: str) -> Head | None:
    """The head of the last round, if there is one and it is for this task.

    Raises:
        IntegrityError: it is damaged.
    """
    if folder is None or not folder.is_dir():
        return None
    head = Head.load(folder)
    return head if head.task == task else None


def known_labels(folder: Path | None, task: str) -> tuple[str, ...]:
    """The labels of the head of the last round, in their order."""
    head = kept(folder, task)
    return head.labels if head else ()
