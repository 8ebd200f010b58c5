"""Which tensors of a fine-tune go with which of the release, and which stay at home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldmerge.core.adapters import Adapter, Target
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import tensor_digest
from coldmerge.core.dtypes import FLOATS, NUMPY
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.files import CHUNK_BYTES
from coldmerge.core.header import TensorSpec
from coldmerge.core.names import match_names, private_pattern

_NOT_THERE = "not a tensor of the release"


@dataclass(frozen=True)
class Matching:
    """`pairs`: release tensor → fine-tune tensor, for all that may leave.

    `kept_home`: (tensor, reason), sorted. `missing`: float tensors of the release that the
    fine-tune does not hold; they count as unchanged.
    """

    pairs: dict[str, str]
    kept_home: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


def match_folder(base: Checkpoint, tuned: Checkpoint, private: Sequence[str]) -> Matching:
    """Match a whole model folder, ties followed: a tensor saved once stands for its twins.

    Raises:
        TaskVectorError: as `sort_out`.
    """
    found = sort_out(base, tuned.tensors, tuned.folder, private)
    extra = {name for name, reason in found.kept_home if reason == _NOT_THERE}
    aliases = {name for name in extra if _same_bytes(tuned, name, sorted(found.pairs.values()))}
    pairs = dict(found.pairs)
    for name in found.missing:
        twin = _same_bytes(base, name, sorted(found.pairs))
        if twin and private_pattern(name, private) is None:
            pairs[name] = found.pairs[twin]
    return Matching(
        pairs,
        tuple((name, reason) for name, reason in found.kept_home if name not in aliases),
        tuple(name for name in found.missing if name not in pairs),
    )


def match_adapter(
    base: Checkpoint, adapter: Adapter, private: Sequence[str]
) -> tuple[Matching, dict[str, Target]]:
    """Match an adapter folder, and give the LoRA target of each release tensor that has one.

    Raises:
        TaskVectorError: as `sort_out`.
    """
    targets = {target.weight: target for target in adapter.targets.values()}
    specs = dict(adapter.whole)
    specs.update({weight: adapter.specs[target.a] for weight, target in targets.items()})
    found = sort_out(base, specs, adapter.folder, private, deltas=frozenset(targets))
    pairs = found.pairs.items()
    return found, {name: targets[source] for name, source in pairs if source in targets}


def sort_out(
    base: Checkpoint,
    tuned: Mapping[str, TensorSpec],
    folder: Path,
    private: Sequence[str],
    deltas: frozenset[str] = frozenset(),
) -> Matching:
    """Match names and check shapes and types. Names in `deltas` have no shape of their own.

    Raises:
        TaskVectorError: nothing matches, or shapes or types differ.
    """
    names = match_names(base.tensors, tuned)
    pairs, kept, seen = {}, [], set()
    for name, target in names.items():
        reason = _reason_to_stay(base, name, target, private)
        if target is not None:
            seen.add(target)
        if reason or target is None:
            kept.append((name if target is None else target, reason or _NOT_THERE))
        else:
            pairs[target] = name
    if not seen:
        raise TaskVectorError(
            "extract.no_match",
            "No tensor of the fine-tuned folder has a name of the release.",
            expected=f"names such as {min(base.tensors, default='(none)')}",
            got=min(tuned, default="no tensors"),
            hint="Check that the folder was trained from this model.",
            folder=folder,
        )
    _check_shapes(base, {t: tuned[n] for t, n in pairs.items() if n not in deltas}, folder)
    floats = (name for name, spec in base.tensors.items() if spec.dtype in FLOATS)
    missing = tuple(name for name in floats if name not in seen)
    return Matching(pairs, tuple(sorted(kept)), missing)


def _reason_to_stay(
    base: Checkpoint, name: str, target: str | None, private: Sequence[str]
) -> str | None:
    pattern = private_pattern(name, private)
    if pattern is None and target is not None:
        pattern = private_pattern(target, private)
    if pattern is not None:
        return f"private: {pattern}"
    if target is None:
        return _NOT_THERE
    dtype = base.dtype(target)
    return None if dtype in FLOATS else f"buffer of type {dtype}"


def _check_shapes(base: Checkpoint, pairs: Mapping[str, TensorSpec], folder: Path) -> None:
    wrong = [name for name, spec in sorted(pairs.items()) if spec.shape != base.shape(name)]
    if wrong:
        first = wrong[:3]
        raise TaskVectorError(
            "extract.shape_mismatch",
            f"{len(wrong)} tensors of the fine-tune have another shape: {', '.join(first)}"
            f"{', …' if len(wrong) > 3 else ''}.",
            expected=", ".join(str(list(base.shape(name))) for name in first),
            got=", ".join(str(list(pairs[name].shape)) for name in first),
            hint="A resized vocabulary or another architecture cannot be merged into this model.",
            folder=folder,
        )
    strange = [name for name, spec in sorted(pairs.items()) if spec.dtype not in FLOATS]
    if strange:
        raise TaskVectorError(
            "extract.dtype_mismatch",
            f"Tensor {strange[0]} of the fine-tune is not a float.",
            expected=", ".join(sorted(FLOATS)),
            got=pairs[strange[0]].dtype,
            hint="Save the fine-tune in float32, bfloat16 or float16.",
            folder=folder,
        )


def _same_bytes(checkpoint: Checkpoint, name: str, others: Sequence[str]) -> str | None:
    """The first of `others` with the type, shape and bytes of `name`.

    Only matrices that are not constant count: two vectors of ones are not tied.
    """
    spec = checkpoint.tensors[name]
    alike = [
        other
        for other in others
        if other != name
        and (checkpoint.dtype(other), checkpoint.shape(other)) == (spec.dtype, spec.shape)
    ]
    if len(spec.shape) < 2 or not alike or _constant(checkpoint, name):
        return None
    wanted = tensor_digest(checkpoint, name)
    return next((other for other in alike if tensor_digest(checkpoint, other) == wanted), None)


def _constant(checkpoint: Checkpoint, name: str) -> bool:
    width = NUMPY[checkpoint.dtype(name)].itemsize
    cells = np.frombuffer(checkpoint.raw(name, 0, CHUNK_BYTES), np.uint8).reshape(-1, width)
    return bool((cells == cells[:1]).all())
