"""Task vectors: what a fine-tune changed, tensor by tensor, against one exact release.

A task vector is a safetensors file with its tensors sorted by name; its data section is
byte for byte what travels. Key `<name>` holds the full delta of release tensor `<name>`;
the pair `<name>.lora_A` (r, *rest) and `<name>.lora_B` (rows, r) with a scaling s stands
for the delta s·B@A of shape (rows, *rest), which is the shape of the release tensor.
Keys `<name>.fisher`, `.gram` and `.trim` are statistics where the metadata says that there
are some: see `coldmerge.core.statistics`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Self, cast, get_args

import numpy as np

from coldmerge.core import strict_json
from coldmerge.core.documents import Encoding, Kind, Statistic, TensorEntry
from coldmerge.core.dtypes import ENCODINGS, NUMPY, Floats32, Floats64, blocks, size, to_float32
from coldmerge.core.errors import NotFoundError, TaskVectorError
from coldmerge.core.files import CHUNK_BYTES, PositionalFile
from coldmerge.core.header import (
    Described,
    Header,
    TensorSpec,
    layout,
    parse_header,
    render_header,
)
from coldmerge.core.names import split_key
from coldmerge.core.progress import Advance
from coldmerge.core.statistics import DTYPE, parse_statistics, statistic_shape, statistics_json

TILE = 2**17
_DELTA = ("", "A", "B")


def vector_header(
    entries: Iterable[Described],
    *,
    kind: str,
    encoding: str,
    base_digest: str,
    scaling: Mapping[str, float],
    statistics: Mapping[Statistic, float] | None = None,
    pad_to: int = 0,
) -> bytes:
    """The header of a task vector file: followed by the payload stream it is complete."""
    metadata = {
        "coldmerge.kind": kind,
        "coldmerge.encoding": encoding,
        "coldmerge.base_digest": base_digest,
        "coldmerge.scaling": json.dumps(dict(sorted(scaling.items())), separators=(",", ":")),
    }
    if statistics:
        metadata["coldmerge.statistics"] = statistics_json(statistics)
    return render_header(layout(entries), metadata, pad_to)


class TaskVector:
    """A task vector file, read a block at a time, from any number of threads at once."""

    def __init__(
        self, file: PositionalFile, header: Header, hashes: Mapping[str, str] | None = None
    ) -> None:
        self._file = file
        self.path = file.path
        self.specs = header.tensors
        self.payload_start = header.data_start
        self.kind: Kind
        self.encoding: Encoding
        self.statistics: dict[Statistic, float]
        self.kind, self.encoding, self.base_digest, self.scaling = _metadata(header, file.path)
        self.statistics = _statistics(header, file.path)
        self._parts = {key: split_key(key, self.statistics) for key in self.specs}
        self._factors = _check_keys(self)
        _check_statistics(self)
        self._hashes = dict(hashes or {})
        self._mine = _Mine()

    @classmethod
    def open(cls, path: Path | str, hashes: Mapping[str, str] | None = None) -> Self:
        """Open a file and check its header. `hashes`: sha256 by key, as whoever wrote it knows.

        Raises:
            CheckpointError: it is not a sound safetensors file.
            TaskVectorError: it is one, but not a task vector.
        """
        file = PositionalFile(Path(path))
        return cls(file, parse_header(file), hashes)

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return type(self).open, (self.path,)

    @property
    def payload_bytes(self) -> int:
        """Length of the data section: what is sent."""
        return self._file.size - self.payload_start

    @cached_property
    def names(self) -> frozenset[str]:
        """The release tensors that the vector changes."""
        return frozenset(self._parts[key][0] for key in self.deltas)

    @cached_property
    def deltas(self) -> tuple[str, ...]:
        """The keys of `specs` that hold deltas or their factors: all but the statistics."""
        return tuple(key for key, (_, part) in self._parts.items() if part in _DELTA)

    def entries(self) -> tuple[TensorEntry, ...]:
        """Every stored tensor with its sha256, in payload order.

        The file is read once, and not at all right after it was written.
        """
        return self._entries

    @cached_property
    def _entries(self) -> tuple[TensorEntry, ...]:
        return tuple(
            TensorEntry(
                name=spec.name,
                dtype=spec.dtype,
                shape=spec.shape,
                sha256=self._hashes.get(spec.name) or self._sha256(spec),
                nbytes=spec.nbytes,
            )
            for spec in self.specs.values()
        )

    def difference(self, signed: Sequence[TensorEntry], advance: Advance) -> str | None:
        """What of the file is not as it was signed: the first thing, or None.

        `advance` is told of every part that was read.
        """
        specs = [(spec.name, spec.dtype, spec.shape) for spec in self.specs.values()]
        if specs != [(entry.name, entry.dtype, entry.shape) for entry in signed]:
            return "its list of tensors"
        for entry in signed:
            if self._sha256(self.specs[entry.name], advance) != entry.sha256:
                return f"tensor {entry.name}"
        return None

    def _sha256(self, spec: TensorSpec, advance: Advance | None = None) -> str:
        digest, at = hashlib.sha256(), self.payload_start + spec.start
        for start, stop in blocks(spec.nbytes, CHUNK_BYTES):
            digest.update(self._file.read(at + start, at + stop))
            if advance is not None:
                advance(stop - start)
        return digest.hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the delta of release tensor `name`.

        Raises:
            NotFoundError: the vector does not touch it.
        """
        if name in self._factors:
            return (
                self.specs[f"{name}.lora_B"].shape[0],
                *self.specs[f"{name}.lora_A"].shape[1:],
            )
        if name not in self.specs:
            raise NotFoundError(
                "task_vector.no_such_tensor",
                f"The task vector does not touch tensor {name}.",
                hint="Ask for one of `TaskVector.names`.",
                path=self.path,
            )
        return self.specs[name].shape

    def is_lora(self, name: str) -> bool:
        """Whether the delta of `name` is stored as two factors."""
        return name in self._factors

    def stored(self, key: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of a stored tensor (a key of `specs`) as float32."""
        spec = self.specs[key]
        kind = NUMPY[spec.dtype]
        start, stop, _ = slice(start, stop).indices(spec.size)
        out = np.empty(max(stop - start, 0) * kind.itemsize, np.uint8)
        self._file.read_into(out.data, self.payload_start + spec.start + start * kind.itemsize)
        return to_float32(out.view(kind))

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened delta of `name`, shape (stop - start,).

        Factors are multiplied in float64 and rounded once; zeros if `name` is not touched.
        The values do not depend on how a tensor is cut into blocks.
        """
        if name in self._factors:
            return self._expansion(name).block(start, stop)
        if name in self.specs:
            return self.stored(name, start, stop)
        return np.zeros(max(stop - start, 0), np.float32)

    def _expansion(self, name: str) -> Expansion:
        last = self._mine.last
        if last is None or last[0] != name:
            spec = self.specs[f"{name}.lora_A"]
            a = self.stored(spec.name, 0, spec.size).reshape(spec.shape[0], -1)
            read_b = partial(self.stored, f"{name}.lora_B")
            rows = self.specs[f"{name}.lora_B"].shape[0]
            made = Expansion(a, read_b, rows, self.scaling[name])
            last = self._mine.last = (name, made)
        return last[1]

    def has_statistic(self, name: str, kind: str) -> bool:
        """Whether a statistic of release tensor `name` is in the file."""
        return self._parts.get(f"{name}.{kind}") == (name, kind)

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened statistic, float32, shape (stop - start,).

        Raises:
            NotFoundError: it was not shipped.
        """
        if not self.has_statistic(name, kind):
            raise NotFoundError(
                "task_vector.no_such_statistic",
                f"The task vector ships no {kind} of tensor {name}.",
                got=", ".join(sorted(self.statistics)) or "no statistics",
                hint="Open the round with this merge method before anybody contributes.",
                path=self.path,
            )
        return self.stored(f"{name}.{kind}", start, stop)

    def norm(self) -> float:
        """L2 norm over all deltas, factors multiplied out, summed in float64."""
        return math.sqrt(math.fsum(self.square(name) for name in sorted(self.names)))

    def square(self, name: str) -> float:
        """Sum of the squares of one delta, in float64."""
        parts = []
        for start, stop in blocks(size(self.shape(name))):
            parts.append(sum_of_squares(self.block(name, start, stop)))
        return math.fsum(parts)


class _Mine(threading.local):
    """Each thread's last expanded tensor: neighbouring blocks come from the same tiles."""

    last: tuple[str, Expansion] | None = None


class Expansion:
    """s·B@A of one tensor, in tiles of whole rows that do not depend on who asks.

    `a` is float32 (r, columns); `read_b` gives elements [start, stop) of the flattened B,
    (rows, r). One tile is held: neighbouring blocks come from it.
    """

    def __init__(
        self, a: Floats32, read_b: Callable[[int, int], Floats32], rows: int, scaling: float
    ) -> None:
        self._a: Floats64 = a.astype(np.float64)
        self._read_b, self._rows, self._scaling = read_b, rows, scaling
        self._rank, self._columns = a.shape
        self._tile_rows = max(1, TILE // max(1, self._columns))
        self._tile: tuple[int, Floats32] = (-1, np.empty(0, np.float32))

    def block(self, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened product, rounded once from float64."""
        start, stop, _ = slice(start, stop).indices(self._rows * self._columns)
        out = np.empty(max(stop - start, 0), np.float32)
        step = self._tile_rows * self._columns
        at = start
        while at < stop:
            number = at // step
            end = min(stop, (number + 1) * step)
            tile = self._tile_at(number)
            out[at - start : end - start] = tile[at - number * step : end - number * step]
            at = end
        return out

    def _tile_at(self, number: int) -> Floats32:
        held, tile = self._tile
        if held != number:
            first = number * self._tile_rows
            last = min(first + self._tile_rows, self._rows)
            b = self._read_b(first * self._rank, last * self._rank)
            with np.errstate(over="ignore", invalid="ignore"):  # whoever reads it checks it
                product = b.astype(np.float64).reshape(-1, self._rank) @ self._a
                product *= self._scaling
                tile = product.astype(np.float32).reshape(-1)
            self._tile = (number, tile)
        return tile


def sum_of_squares(values: Floats32) -> float:
    """Σx² in float64, on one thread: NaN or Inf if and only if `values` holds one."""
    with np.errstate(invalid="ignore"):  # a signalling NaN: whoever reads the sum finds it
        wide = values.astype(np.float64)
    return float(np.einsum("i,i->", wide, wide))


def _metadata(header: Header, path: Path) -> tuple[Kind, Encoding, str, dict[str, float]]:
    found = header.metadata
    try:
        kind, encoding = found["coldmerge.kind"], found["coldmerge.encoding"]
        digest = found["coldmerge.base_digest"]
        table = strict_json.loads(found["coldmerge.scaling"])
        scaling = {key: float(value) for key, value in table.items()}
        sound = kind in get_args(Kind) and encoding in ENCODINGS
        sound = sound and re.fullmatch("([0-9a-f]{64})?", digest) is not None
        sound = sound and all(type(value) in (int, float) for value in table.values())
        sound = sound and all(map(math.isfinite, scaling.values()))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        sound = False
    if not sound:
        raise TaskVectorError(
            "task_vector.not_one",
            "A safetensors file is not a task vector: its metadata is missing or malformed.",
            expected="coldmerge.kind, .encoding, .base_digest and .scaling",
            got=sorted(found)[:6],
            hint="Make one from a fine-tuned folder with `coldmerge push --dry-run`.",
            path=path,
        )
    return cast(Kind, kind), cast(Encoding, encoding), digest, scaling


def _statistics(header: Header, path: Path) -> dict[Statistic, float]:
    text = header.metadata.get("coldmerge.statistics", "{}")
    try:
        return parse_statistics(text)
    except (ValueError, RecursionError) as error:
        raise TaskVectorError(
            "task_vector.bad_statistics",
            f"A task vector does not say what its statistics were made of: {error}.",
            expected='coldmerge.statistics, such as {"fisher": 1000}',
            got=text[:120],
            hint="Extract it again; a task vector is not edited by hand.",
            path=path,
        ) from error


def _check_keys(vector: TaskVector) -> frozenset[str]:
    """The names stored as factors.

    Raises:
        TaskVectorError: tensors are not sorted, of another type, or factors do not pair up.
    """
    keys = list(vector.specs)
    parts = [vector._parts[key] for key in vector.deltas]
    factors = frozenset(name for name, part in parts if part)
    full = {name for name, part in parts if not part}
    wrong = [k for k in vector.deltas if vector.specs[k].dtype != ENCODINGS[vector.encoding]]
    wrong += [name for name in factors if not _pairs_up(vector, name) or name in full]
    wrong += [after for before, after in pairwise(keys) if before >= after]
    wrong += sorted(factors ^ set(vector.scaling))
    if wrong or (factors and vector.kind == "full"):
        expected = f"sorted {ENCODINGS[vector.encoding]} tensors; for lora, factors with scaling"
        raise _malformed(vector, min(wrong, default="its kind"), expected)
    return factors


def _check_statistics(vector: TaskVector) -> None:
    """Hold the statistics against the tensors they are about.

    Raises:
        TaskVectorError: one does not fit its tensor, or there is none of a kind.
    """
    wrong = []
    unseen = set(vector.statistics)
    for key, (name, part) in vector._parts.items():
        if part in _DELTA:
            continue
        unseen.discard(cast(Statistic, part))
        shape = vector.shape(name) if name in vector.names else None
        fits = statistic_shape(cast(Statistic, part), shape)
        if (vector.specs[key].dtype, vector.specs[key].shape) != (DTYPE, fits):
            wrong.append(key)
    if wrong or unseen:
        raise _malformed(vector, min([*wrong, *unseen]), f"{DTYPE} statistics of its tensors")


def _malformed(vector: TaskVector, where: str, expected: str) -> TaskVectorError:
    return TaskVectorError(
        "task_vector.malformed",
        f"A task vector is malformed at {where}.",
        expected=expected,
        hint="Extract it again; a task vector is not edited by hand.",
        path=vector.path,
    )


def _pairs_up(vector: TaskVector, name: str) -> bool:
    a, b = vector.specs.get(f"{name}.lora_A"), vector.specs.get(f"{name}.lora_B")
    if a is None or b is None:
        return False
    return len(b.shape) == 2 and len(a.shape) >= 2 and a.shape[0] == b.shape[1]
