"""Tensors that were sent twice with the same bytes: one of the two was not trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.core.dtypes import blocks
from coldmerge.core.files import CHUNK_BYTES
from coldmerge.core.names import split_key

LARGE = 4096
"""Bytes from which a tensor does not come out the same twice by accident."""


def shared_tensor(manifest: Manifest, others: Iterable[Manifest]) -> tuple[str, str] | None:
    """(tensor, contributor) of a large tensor that another contributor lists, too.

    Left out of account: statistics, tensors of zeros, and the factor `lora_A`, which an
    adapter draws from a seed that contributors may have in common.
    """
    mine = {entry.sha256: entry for entry in _deltas(manifest)}
    for other in others:
        found = _common(mine, other) if other.contributor != manifest.contributor else None
        if found is not None:
            return found, other.contributor
    return None


def repeated_tensor(manifest: Manifest, earlier: Iterable[Manifest]) -> tuple[str, Manifest] | None:
    """(tensor, manifest) of a large tensor that its contributor sent before, to another round.

    What was left out of account above is so here: two rounds' fine-tunes have nothing else in
    common to the bit.
    """
    mine = {entry.sha256: entry for entry in _deltas(manifest)}
    for other in earlier:
        same = other.contributor == manifest.contributor and other.round != manifest.round
        found = _common(mine, other) if same else None
        if found is not None:
            return found, other
    return None


def _common(mine: Mapping[str, TensorEntry], other: Manifest) -> str | None:
    for entry in _deltas(other):
        found = mine.get(entry.sha256)
        if found is not None and entry.sha256 != _zeros(entry.nbytes):
            return found.name
    return None


def _deltas(manifest: Manifest) -> list[TensorEntry]:
    return [
        entry
        for entry in manifest.tensors
        if entry.nbytes >= LARGE and split_key(entry.name, manifest.statistics)[1] in ("", "B")
    ]


def _zeros(nbytes: int) -> str:
    digest, zeros = hashlib.sha256(), bytes(min(nbytes, CHUNK_BYTES))
    for start, stop in blocks(nbytes, CHUNK_BYTES):
        digest.update(zeros[: stop - start])
    return digest.hexdigest()
