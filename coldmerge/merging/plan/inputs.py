"""Opening what a plan names: the base, and every input as deltas or weights against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np

from coldmerge.core.algebra import Delta
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import check_base, is_adapter
from coldmerge.core.digests import content_entries
from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ConfigError, TaskVectorError
from coldmerge.core.extraction import extract
from coldmerge.core.matching import match_folder
from coldmerge.core.task_vector import TaskVector
from coldmerge.merging.merger import Space
from coldmerge.merging.plan.plan import Named, Plan
from coldmerge.merging.plan.references import Place, resolve
from coldmerge.merging.sources import Input, Tuned


class Adapted:
    """A model folder with an adapter of its own on top: θ = tuned + s·B@A."""

    def __init__(
        self, base: Checkpoint, tuned: Tuned, adapter: Delta, pairs: dict[str, str]
    ) -> None:
        self._base, self._tuned, self._adapter, self._pairs = base, tuned, adapter, pairs
        self.base_digest = tuned.base_digest
        self.names = tuned.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self._tuned.shape(name)

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the tensor with the adapter merged in."""
        theta = self._tuned.theta(name, start, stop)
        if self._pairs[name] in self._adapter.names:
            with np.errstate(over="ignore", invalid="ignore"):
                theta += self._adapter.block(self._pairs[name], start, stop)
        return theta

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of τ = θ − base."""
        theta = self.theta(name, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.subtract(theta, self._base.block(name, start, stop), out=theta)


class Opened:
    """The base and the inputs of a plan; a context manager that holds temporary files.

    `places` are the inputs' places in `Plan.models`, in the order of their keys, None for a
    base that the plan does not list. `notes` are sentences that a person should read.
    """

    def __init__(self, plan: Plan, models: Path | None = None) -> None:
        self._plan, self._models = plan, models
        self._scratch = TemporaryDirectory(prefix="coldmerge-")
        self.notes: list[str] = []
        self._checkpoints: dict[Path, Checkpoint] = {}

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def _open(self) -> None:
        plan = self._plan
        found = [self._resolve(model) for model in plan.models]
        base = self._resolve(plan.base) if plan.base else self._first_folder(found)
        self._base_path = base.path
        self.base = self._checkpoint(base.path)
        self._digest = self._digest_if_needed(found)
        chosen: list[tuple[int | None, Named, Place]] = [
            (i, plan.models[i], place)
            for i, place in enumerate(found)
            if base_counts(plan) or place != base
        ]
        if base_counts(plan) and plan.base and base not in found:
            chosen.append((None, plan.base, base))
        if not chosen:
            raise ConfigError(
                "plan.no_inputs",
                f"{plan.method_at}: {plan.method.name} has nothing to merge into the base.",
                expected="at least one model other than the base",
                got=", ".join(model.name for model in plan.models),
                hint="List the fine-tuned models under `models:`.",
                at=plan.method_at,
            )
        self.places = tuple(i for i, _, _ in chosen)
        self.inputs = tuple(
            Input(f"{number:06d}", self._source(named, place), label=named.name)
            for number, (_, named, place) in enumerate(chosen)
        )

    def _resolve(self, model: Named) -> Place:
        return resolve(model, self._plan.path.absolute().parent, self._models)

    def _first_folder(self, found: Sequence[Place]) -> Place:
        plan = self._plan
        folder = next((p for p in found if p.path.is_dir() and not is_adapter(p.path)), None)
        if folder is None or not base_counts(plan):
            raise ConfigError(
                "plan.base_missing",
                f"{plan.method_at}: {plan.method.name} of these inputs needs a base model.",
                expected="base_model",
                hint="Add `base_model:` with the model that the others were fine-tuned from.",
                at=plan.method_at,
            )
        return Place(folder.path)

    def _digest_if_needed(self, found: Sequence[Place]) -> str:
        """The base's content digest, which takes reading it, if a task vector names one."""
        if any(place.path.is_file() for place in found):
            return content_entries(self.base).digest
        return ""

    def _checkpoint(self, path: Path) -> Checkpoint:
        if path not in self._checkpoints:
            self._checkpoints[path] = Checkpoint.open(path)
        return self._checkpoints[path]

    def _source(self, named: Named, place: Place) -> Delta:
        if place.path.is_file():
            vector = TaskVector.open(place.path)
            check_base(vector, self._digest)
            return vector
        if is_adapter(place.path):
            return self._adapter(self.base, place.path, self._digest)
        model = self._checkpoint(place.path)
        pairs = self._pairs(named, model)
        tuned = Tuned(self.base, model, pairs, self._digest)
        if place.adapter is None:
            return tuned
        if place.path == self._base_path:
            return self._adapter(self.base, place.adapter, self._digest)
        return Adapted(self.base, tuned, self._adapter(model, place.adapter, ""), pairs)

    def _adapter(self, base: Checkpoint, folder: Path, digest: str) -> TaskVector:
        out = (
            Path(self._scratch.name)
            / f"{len(list(Path(self._scratch.name).iterdir()))}.safetensors"
        )
        return extract(base, folder, out, base_digest=digest).task_vector

    def _pairs(self, named: Named, model: Checkpoint) -> dict[str, str]:
        if model is self.base:
            return {
                name: name for name in model.tensors if model.dtype(name) in ("F32", "F16", "BF16")
            }
        found = match_folder(self.base, model, ())
        if found.missing:
            first = ", ".join(found.missing[:3])
            raise TaskVectorError(
                "plan.tensors_missing",
                f"{named.where}: {named.name} lacks {len(found.missing)} tensors of the base:"
                f" {first}{', …' if len(found.missing) > 3 else ''}.",
                expected=f"all {len(self.base.tensors)} tensors of {self.base.folder}",
                got=f"{len(model.tensors)} tensors, {len(found.pairs)} of them known",
                hint="Merge models of one architecture; a part of a model goes in as a task"
                " vector (`coldmerge extract`).",
                folder=model.folder,
            )
        if found.kept_home:
            extra = [name for name, _ in found.kept_home]
            self.notes.append(
                f"{named.name}: {len(extra)} tensors that the base does not merge are left out:"
                f" {', '.join(extra[:3])}{', …' if len(extra) > 3 else ''}."
            )
        return found.pairs


def base_counts(plan: Plan) -> bool:
    """Whether the base is an input like the others, and need not be named."""
    return plan.method.space is Space.WEIGHTS
