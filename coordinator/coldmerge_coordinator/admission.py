"""What a manifest must say to be admitted: pure checks, before a byte of payload is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from coldmerge.core import dtypes
from coldmerge.core.documents import Manifest, Statistic, TensorEntry
from coldmerge.core.errors import ManifestError, ResourceError, TaskVectorError
from coldmerge.core.names import is_private, split_factor, split_key
from coldmerge.core.statistics import DTYPE
from coldmerge.rounds.continuous import AdmittedBase
from coldmerge_coordinator.statistics import check_statistics

LORA_A = ".lora_A"
LORA_B = ".lora_B"
ALWAYS_ALLOWED_RANK = 64
"""Ranks that adapters have in practice are fine even on tensors that are smaller."""


@dataclass(frozen=True)
class Target:
    """What a contribution must be against: one round, one exact release of `bases`.

    `bases`: the release the round is on, and after it those of which it takes stale task
    vectors. `tensors`: the release's tensors by name, which all `bases` have. `contributor`: who
    is calling, by certificate. `statistics` and `density`: what the round's recipe asks for
    beside deltas.
    """

    federation: str
    contributor: str
    model: str
    round: str
    bases: tuple[AdmittedBase, ...]
    tensors: Mapping[str, TensorEntry]
    private: tuple[str, ...]
    max_payload_bytes: int
    statistics: frozenset[Statistic] = frozenset()
    density: float | None = None


def check_manifest(manifest: Manifest, target: Target) -> None:
    """Refuse a manifest that does not fit the round it is meant for.

    Raises:
        ManifestError: another federation, contributor, model or round; entries out of
            order; a length that contradicts a shape.
        TaskVectorError: another base; an unknown, private or unmergeable tensor; a wrong
            shape or type; half of a LoRA pair; statistics other than the round's.
        ResourceError: larger than one contribution may be.
    """
    _check_addressee(manifest, target)
    _check_order(manifest)
    parts = {entry.name: split_key(entry.name, manifest.statistics) for entry in manifest.tensors}
    entries = {e.name: e for e in manifest.tensors if parts[e.name][1] not in manifest.statistics}
    lora = _lora_targets(manifest, entries)
    _check_scaling(manifest, lora)
    for entry in manifest.tensors:
        here = entry.name in entries
        _check_bytes(manifest, entry, dtypes.ENCODINGS[manifest.encoding] if here else DTYPE)
        if here and parts[entry.name][0] not in lora:
            _check_full(manifest, entry, target)
    for name in sorted(lora):
        _check_pair(manifest, name, entries, target)
    changed = {name: target.tensors[name].shape for name in {parts[key][0] for key in entries}}
    check_statistics(manifest, changed, target.statistics, target.density)
    if manifest.payload_bytes > target.max_payload_bytes:
        raise ResourceError(
            "upload.too_large",
            "The task vector is larger than one contribution may be.",
            expected=f"at most {target.max_payload_bytes} bytes",
            got=f"{manifest.payload_bytes} bytes",
            hint="Send it as bf16 or as LoRA, or ask the admin to raise max_payload_bytes.",
            round=manifest.round,
        )


def _lora_targets(manifest: Manifest, deltas: Collection[str]) -> set[str]:
    parts = [split_factor(name) for name in deltas]
    return {name for name, factor in parts if factor} if manifest.kind == "lora" else set()


def _check_addressee(manifest: Manifest, target: Target) -> None:
    for what, expected, got in (
        ("federation", target.federation, manifest.federation),
        ("contributor", target.contributor, manifest.contributor),
        ("model", target.model, manifest.model),
        ("round", target.round, manifest.round),
    ):
        if expected != got:
            raise ManifestError(
                "manifest.wrong_addressee",
                f"The manifest names another {what}.",
                expected=expected,
                got=got,
                hint="Prepare the contribution again, on the machine that sends it.",
                round=target.round,
            )
    named = AdmittedBase(manifest.base_number, manifest.base_digest)
    if all((base.number, base.digest) != (named.number, named.digest) for base in target.bases):
        raise _wrong_base(named, target)


def _wrong_base(named: AdmittedBase, target: Target) -> TaskVectorError:
    newest, *older = target.bases
    hint = f"Run `coldmerge pull {target.model}`, fine-tune that release and push again."
    if older and named.number not in {base.number for base in target.bases}:
        return TaskVectorError(
            "manifest.too_stale",
            f"The task vector is against a release from which round {target.round} takes none.",
            expected=f"release {' or '.join(str(base.number) for base in target.bases)}",
            got=f"release {named.number}",
            hint=hint,
            round=target.round,
            model=target.model,
        )
    meant = next((base for base in older if base.number == named.number), newest)
    return TaskVectorError(
        "manifest.wrong_base",
        f"The task vector is against another release than round {target.round} needs.",
        expected=f"release {meant.number}, {meant.digest}",
        got=f"release {named.number}, {named.digest}",
        hint=hint,
        round=target.round,
        model=target.model,
    )


def _check_order(manifest: Manifest) -> None:
    names = [entry.name for entry in manifest.tensors]
    for before, after in pairwise(names):
        if before >= after:
            raise ManifestError(
                "manifest.not_sorted",
                "The tensors of a manifest are not sorted by name, or one is listed twice.",
                expected="names in rising order",
                got=f"{before}, then {after}",
                hint="Prepare the contribution with `coldmerge push`.",
                round=manifest.round,
            )


def _check_scaling(manifest: Manifest, lora: set[str]) -> None:
    if set(manifest.scaling) != lora:
        odd = sorted(set(manifest.scaling) ^ lora)[:3]
        raise ManifestError(
            "manifest.wrong_scaling",
            "A manifest must give a scaling for each LoRA target, and for nothing else.",
            expected=f"{len(lora)} scalings",
            got=f"{len(manifest.scaling)}; unmatched: {', '.join(odd)}",
            hint="Prepare the contribution with `coldmerge push`.",
            round=manifest.round,
        )


def _check_bytes(manifest: Manifest, entry: TensorEntry, dtype: str) -> None:
    if entry.dtype != dtype:
        raise TaskVectorError(
            "manifest.wrong_dtype",
            f"Tensor {entry.name} has another type than the manifest's encoding says.",
            expected=f"{dtype}, as encoding {manifest.encoding} has it",
            got=entry.dtype,
            hint="Prepare the contribution with `coldmerge push`.",
            round=manifest.round,
        )
    length = dtypes.nbytes(dtype, entry.shape)
    if entry.nbytes != length or length == 0:
        raise ManifestError(
            "manifest.wrong_length",
            f"Tensor {entry.name} is listed with a length that its shape does not have.",
            expected=f"{length} bytes for {dtype} {list(entry.shape)}, and at least one element",
            got=f"{entry.nbytes} bytes",
            hint="Prepare the contribution with `coldmerge push`.",
            round=manifest.round,
        )


def _base_tensor(manifest: Manifest, name: str, target: Target) -> TensorEntry:
    if is_private(name, target.private):
        raise TaskVectorError(
            "manifest.private_tensor",
            f"Tensor {name} is private in model {target.model}: it must stay with its owner.",
            expected=f"nothing that matches {', '.join(target.private)}",
            got=name,
            hint="It was not stored. Prepare the contribution with `coldmerge push`.",
            round=manifest.round,
        )
    base = target.tensors.get(name)
    if base is None:
        raise TaskVectorError(
            "manifest.unknown_tensor",
            f"Release {target.bases[0].number} of {target.model} has no tensor {name}.",
            expected=f"one of its {len(target.tensors)} tensors",
            got=name,
            hint="Only tensors of the release may be sent: new heads stay at home.",
            round=manifest.round,
        )
    if base.dtype not in dtypes.FLOATS:
        raise TaskVectorError(
            "manifest.buffer",
            f"Tensor {name} is a buffer: it does not take part in merging.",
            expected=f"a tensor of type {' or '.join(sorted(dtypes.FLOATS))}",
            got=base.dtype,
            hint="Prepare the contribution with `coldmerge push`, which leaves buffers out.",
            round=manifest.round,
        )
    return base


def _check_full(manifest: Manifest, entry: TensorEntry, target: Target) -> None:
    base = _base_tensor(manifest, entry.name, target)
    if entry.shape != base.shape:
        raise _wrong_shape(manifest, entry.name, list(base.shape), list(entry.shape))


def _check_pair(
    manifest: Manifest, name: str, entries: Mapping[str, TensorEntry], target: Target
) -> None:
    base = _base_tensor(manifest, name, target)
    a, b = entries.get(name + LORA_A), entries.get(name + LORA_B)
    if a is None or b is None:
        raise TaskVectorError(
            "manifest.missing_tensor",
            f"The LoRA update of {name} lists only one of its two factors.",
            expected=f"{name}{LORA_A} and {name}{LORA_B}",
            got=name + (LORA_B if a is None else LORA_A),
            hint="Prepare the contribution with `coldmerge push`.",
            round=manifest.round,
        )
    if name in entries:
        raise TaskVectorError(
            "manifest.tensor_twice",
            f"Tensor {name} is listed both whole and as LoRA factors.",
            hint="Prepare the contribution with `coldmerge push`.",
            round=manifest.round,
        )
    rank = a.shape[0] if a.shape else 0
    _check_rank(manifest, name, rank, base.shape)
    right = ((rank, *base.shape[1:]), (base.shape[0] if base.shape else 0, rank))
    if rank < 1 or len(base.shape) < 2 or (a.shape, b.shape) != right:
        raise _wrong_shape(
            manifest,
            name,
            f"factors [r, …] and [rows, r] of {list(base.shape)}, r at least 1",
            f"{list(a.shape)} and {list(b.shape)}",
        )


def _check_rank(manifest: Manifest, name: str, rank: int, shape: tuple[int, ...]) -> None:
    """A factor is held whole while it is merged: it must not outgrow its tensor."""
    most = max(ALWAYS_ALLOWED_RANK, min(shape[0], prod(shape[1:])) if shape else 0)
    if rank > most:
        raise TaskVectorError(
            "manifest.rank_too_large",
            f"The LoRA update of {name} has a larger rank than its tensor can have.",
            expected=f"at most {most}",
            got=rank,
            hint="Ship the merged model: `merge_and_unload()`, save it, then push that folder.",
            round=manifest.round,
        )


def _wrong_shape(manifest: Manifest, name: str, expected: object, got: object) -> TaskVectorError:
    return TaskVectorError(
        "manifest.wrong_shape",
        f"Tensor {name} does not have the release's shape.",
        expected=expected,
        got=got,
        hint="Fine-tune the release itself: its vocabulary and layers must not be resized.",
        round=manifest.round,
    )
