"""One float tensor on its way into the blobs: its fp32 master, and what is published of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from coldmerge.core.dtypes import Floats32, as_bytes, from_float32
from coldmerge.core.errors import CheckpointError
from coldmerge_coordinator.store.blobs import BlobStore, BlobWriter


@dataclass(frozen=True)
class Stored:
    """The blobs of one tensor: sha256 of the published bytes and of the fp32 master."""

    published: str
    nbytes: int
    master: str


class TensorSink:
    """Takes the master's float32 values in order; renders the published type beside them.

    A tensor published in F32 is its own master: one blob. A context manager: what was
    not committed is removed.
    """

    def __init__(self, blobs: BlobStore, name: str, dtype: str) -> None:
        self._name, self._dtype = name, dtype
        self._open = ExitStack()
        self._master: BlobWriter = self._open.enter_context(blobs.writer())
        self._published: BlobWriter | None = None
        if dtype != "F32":
            self._published = self._open.enter_context(blobs.writer())

    def write(self, block: Floats32) -> None:
        """Append the next values.

        Raises:
            CheckpointError: a value is NaN or infinite, or beyond the published type.
            ResourceError: the disk is full.
        """
        rendered = from_float32(block, self._dtype)
        if not np.isfinite(rendered).all():
            raise CheckpointError(
                "checkpoint.not_finite",
                f"Tensor {self._name} would hold NaN or infinity.",
                expected=f"finite values in {self._dtype}",
                got=f"{np.count_nonzero(~np.isfinite(rendered))} others in one block",
                hint="Find what produced them; a release must be finite everywhere.",
                tensor=self._name,
            )
        self._master.write(as_bytes(block))
        if self._published is not None:
            self._published.write(as_bytes(rendered))

    def commit(self) -> Stored:
        """Make both durable."""
        master, nbytes = self._master.commit()
        if self._published is None:
            return Stored(master, nbytes, master)
        published, nbytes = self._published.commit()
        return Stored(published, nbytes, master)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
