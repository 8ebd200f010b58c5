"""What a model changes against a base, read by block, whatever form it is stored in.

A model folder, a PEFT adapter folder and a task vector file all give the same protocol
(`core.algebra.Delta`), without writing anything.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coldmerge.core.adapters import Adapter, is_adapter
from coldmerge.core.algebra import Delta, check_fits
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import NotFoundError, TaskVectorError
from coldmerge.core.matching import match_adapter, match_folder
from coldmerge.core.task_vector import Expansion, TaskVector


class Tuned:
    """A model folder as deltas against `base`. `pairs`: base tensor → the model's name for it."""

    def __init__(
        self, base: Checkpoint, model: Checkpoint, pairs: dict[str, str], base_digest: str = ""
    ) -> None:
        self._base, self._model, self._pairs = base, model, pairs
        self.base_digest = base_digest
        self.names = frozenset(pairs)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self._model.shape(self._pairs[name])

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the model's own tensor, float32: a fresh array."""
        return self._model.block(self._pairs[name], start, stop)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened change, float32."""
        theta = self.theta(name, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.subtract(theta, self._base.block(name, start, stop), out=theta)


class AdapterDelta:
    """A PEFT adapter folder: LoRA targets multiplied out, tensors saved whole minus the base.

    Read it from one thread: the factors of the tensor asked for last are held.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, base_digest: str = "") -> None:
        self._base, self._adapter = base, adapter
        self.base_digest = base_digest
        found, self._targets = match_adapter(base, adapter, ())
        self._whole = {n: s for n, s in found.pairs.items() if n not in self._targets}
        for name, target in self._targets.items():
            adapter.shapes(target, base.shape(name))
        self.names = frozenset(found.pairs)
        self._held: tuple[str, Expansion] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self._base.shape(name)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened change, float32."""
        if name in self._whole:
            tuned = self._adapter.values(self._whole[name], start, stop)
            with np.errstate(over="ignore", invalid="ignore"):
                return np.subtract(tuned, self._base.block(name, start, stop))
        with np.errstate(over="ignore", invalid="ignore"):
            return self._expansion(name).block(start, stop)

    def _expansion(self, name: str) -> Expansion:
        """The product of the tensor asked for last: its factors are read once."""
        if self._held is None or self._held[0] != name:
            target = self._targets[name]
            a, b = self._adapter.factors(target, self._base.shape(name))
            flat = b.reshape(-1)
            product = Expansion(
                a.reshape(len(a), -1), lambda *at: flat[slice(*at)], len(b), target.scaling
            )
            self._held = (name, product)
        return self._held[1]


def open_delta(base: Checkpoint, path: Path, base_digest: str = "") -> Delta:
    """What `path` changes against `base`: a model folder, an adapter folder, a task vector.

    `base_digest` is the content digest of `base`; where it is given, a task vector of
    another release is refused.

    Raises:
        NotFoundError: there is nothing at `path`.
        CheckpointError: it cannot be read.
        TaskVectorError: it does not fit the base.
    """
    if path.is_file():
        return open_vector(base, path, base_digest)
    if not path.is_dir():
        raise NotFoundError(
            "weights.not_found",
            f"There is nothing at {path}.",
            expected="a model folder, a PEFT adapter folder or a task vector file",
            hint="Check the path; names of a hub are not looked up, download the model first.",
        )
    if is_adapter(path):
        return AdapterDelta(base, Adapter(path), base_digest)
    model = Checkpoint.open(path)
    return Tuned(base, model, match_folder(base, model, ()).pairs, base_digest)


def open_vector(base: Checkpoint, path: Path, base_digest: str = "") -> TaskVector:
    """The task vector file at `path`; with a `base_digest`, one of that release only.

    Raises:
        CheckpointError: it cannot be read.
        TaskVectorError: it starts from another release, or does not fit `base`.
    """
    vector = TaskVector.open(path)
    if base_digest and vector.base_digest != base_digest:
        raise TaskVectorError(
            "task_vector.other_base",
            "A task vector starts from another release than the one given.",
            expected=base_digest,
            got=vector.base_digest,
            hint="Give the very folder it was extracted against, with its tokenizer files.",
            path=vector.path,
        )
    check_fits(base, vector)
    return vector
