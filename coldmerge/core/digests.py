"""Digests of what a release is made of: one sha256 per tensor and file, one Merkle root.

The root is that of RFC 6962: a leaf is sha256(0x00 || canonical JSON of an entry), a node
is sha256(0x01 || left || right), over the tensors sorted by name and then the files sorted
by path. How the tensors are sharded, and the model card, are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import FileEntry, TensorEntry
from coldmerge.core.dtypes import blocks
from coldmerge.core.errors import IntegrityError
from coldmerge.core.files import CHUNK_BYTES, PositionalFile
from coldmerge.core.merkle import merkle_root
from coldmerge.core.progress import Advance, Counter, Progress, silent


@dataclass(frozen=True)
class Content:
    """Tensors sorted by name and files sorted by path: what `content_digest` names."""

    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]

    @cached_property
    def digest(self) -> str:
        """The content digest."""
        return content_digest(self.tensors, self.files)

    @cached_property
    def by_name(self) -> dict[str, TensorEntry]:
        """The tensors by name."""
        return {entry.name: entry for entry in self.tensors}

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: {"tensors": […], "files": […]}."""
        return {
            "tensors": [entry.model_dump(mode="json") for entry in self.tensors],
            "files": [entry.model_dump(mode="json") for entry in self.files],
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            IntegrityError: it is not a list of tensors and files, or not sorted and unique.
        """
        try:
            tensors = tuple(TensorEntry.model_validate(entry) for entry in body["tensors"])
            files = tuple(FileEntry.model_validate(entry) for entry in body["files"])
        except (KeyError, TypeError, ValidationError) as error:
            raise IntegrityError(
                "content.malformed",
                "A list of a release's tensors and files cannot be read.",
                got=str(error).splitlines()[0],
                hint="Client and coordinator may differ in version; compare `coldmerge --version`.",
            ) from error
        names, paths = [e.name for e in tensors], [e.path for e in files]
        if names != sorted(set(names)) or paths != sorted(set(paths)):
            raise IntegrityError(
                "content.not_sorted",
                "A list of a release's tensors and files is not sorted, or names one twice.",
                hint="Do not trust this list; fetch the release again.",
            )
        return cls(tensors, files)


def content_entries(checkpoint: Checkpoint, progress: Advance | None = None) -> Content:
    """Hash every tensor and file of a folder, one chunk at a time.

    `progress` is called with the number of bytes hashed since the last call.
    """
    tensors = []
    for name, spec in checkpoint.tensors.items():
        sha256 = tensor_digest(checkpoint, name, progress)
        tensors.append(
            TensorEntry(
                name=name, dtype=spec.dtype, shape=spec.shape, sha256=sha256, nbytes=spec.nbytes
            )
        )
    return Content(tuple(tensors), file_entries(checkpoint))


def digest_of(checkpoint: Checkpoint, progress: Progress = silent) -> str:
    """The content digest of a folder, which takes reading it: the step `hash` of `progress`."""
    total = sum(spec.nbytes for spec in checkpoint.tensors.values())
    return content_entries(checkpoint, Counter("hash", total, progress).add).digest


def tensor_digest(checkpoint: Checkpoint, name: str, progress: Advance | None = None) -> str:
    """sha256 (hexadecimal) of a tensor's bytes, read one chunk at a time."""
    digest = hashlib.sha256()
    for start, stop in blocks(checkpoint.tensors[name].nbytes, CHUNK_BYTES):
        digest.update(checkpoint.raw(name, start, stop))
        if progress:
            progress(stop - start)
    return digest.hexdigest()


def file_entries(checkpoint: Checkpoint) -> tuple[FileEntry, ...]:
    """The files beside the weights of a folder with their hashes, sorted by path."""
    found = []
    for path in checkpoint.files():
        digest, size = file_digest(checkpoint.folder / path)
        found.append(FileEntry(path=path.as_posix(), size=size, sha256=digest))
    return tuple(sorted(found, key=lambda entry: entry.path))


def file_digest(path: Path) -> tuple[str, int]:
    """sha256 (hexadecimal) and size of a file, read one chunk at a time."""
    digest = hashlib.sha256()
    with PositionalFile(path) as file:
        for start, stop in blocks(file.size, CHUNK_BYTES):
            digest.update(file.read(start, stop))
    return digest.hexdigest(), file.size


def content_digest(tensors: Sequence[TensorEntry], files: Sequence[FileEntry]) -> str:
    """Merkle root over tensors sorted by name, then files sorted by path."""
    leaves = [entry.canonical() for entry in sorted(tensors, key=lambda entry: entry.name)]
    leaves += [entry.canonical() for entry in sorted(files, key=lambda entry: entry.path)]
    return merkle_root(leaves)


def master_digest(masters: Mapping[str, str]) -> str:
    """Merkle root over the fp32 masters: tensor name → sha256 of its float32 bytes."""
    leaves = [
        json.dumps(
            {"name": name, "sha256": masters[name], "type": "coldmerge.master/1"},
            sort_keys=True,
            separators=(",", ":"),
        ).encode("ascii")
        for name in sorted(masters)
    ]
    return merkle_root(leaves)
