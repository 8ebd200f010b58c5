"""The safetensors header, checked by us before any library sees the file.

A file is an 8-byte little-endian length, that many bytes of JSON, then the data. We
demand more than the format does: no duplicate keys, plain names, no gap, no overlap.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coldmerge.core.dtypes import NUMPY, nbytes, size
from coldmerge.core.errors import CheckpointError
from coldmerge.core.files import PositionalFile
from coldmerge.core.ids import TENSOR_NAME
from coldmerge.core.strict_json import unique

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16
MAX_EXTENT = 2**40
MAX_ELEMENTS = 2**60
"""Of the extents that are not 0: numpy and safetensors multiply all of them in 64 bits."""
_KEYS = {"dtype", "shape", "data_offsets"}


class Described(Protocol):
    """Anything with a name, a safetensors dtype and a shape."""

    @property
    def name(self) -> str:
        """Canonical tensor name."""
        ...

    @property
    def dtype(self) -> str:
        """Safetensors type name, such as `BF16`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents; () for a scalar."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: [start, stop) are byte offsets in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return size(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors in file order, metadata, and where the data begins."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int


def layout(entries: Iterable[Described]) -> tuple[TensorSpec, ...]:
    """Lay tensors end to end, in the order given."""
    specs, at = [], 0
    for entry in entries:
        stop = at + nbytes(entry.dtype, entry.shape)
        specs.append(TensorSpec(entry.name, entry.dtype, tuple(entry.shape), at, stop))
        at = stop
    return tuple(specs)


def render_header(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], pad_to: int = 0
) -> bytes:
    """Length, JSON and padding: the same input gives the same bytes, a multiple of 8.

    `pad_to` asks for at least that many bytes, so that a header can be reserved first
    and written last.
    """
    body: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for spec in specs:
        body[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [spec.start, spec.stop],
        }
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text = text.ljust(max(len(text) + -len(text) % 8, pad_to - 8))
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: anything is wrong with it; the code says what.
    """
    with PositionalFile(path) as file:
        return parse_header(file)


def parse_header(file: PositionalFile) -> Header:
    """`read_header` on an open file.

    Raises:
        CheckpointError: as `read_header`.
    """
    length = _header_length(file)
    body = _load_json(bytes(file.read(8, 8 + length)), file.path)
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.items())):
        raise CheckpointError(
            "safetensors.bad_metadata",
            "The metadata of a safetensors file is not a table of strings.",
            hint="Save the model again with `save_pretrained`.",
            path=file.path,
        )
    if len(body) > MAX_TENSORS:
        raise CheckpointError(
            "safetensors.too_many_tensors",
            "A safetensors file lists too many tensors.",
            expected=f"at most {MAX_TENSORS}",
            got=len(body),
            hint="This is not a model that coldmerge can handle.",
            path=file.path,
        )
    specs = [_parse_tensor(name, value, file.path) for name, value in body.items()]
    specs.sort(key=lambda spec: (spec.start, spec.stop))
    _check_coverage(specs, file.size - 8 - length, file.path)
    return Header({spec.name: spec for spec in specs}, metadata, 8 + length)


def _header_length(file: PositionalFile) -> int:
    length = struct.unpack("<Q", file.read(0, 8))[0] if file.size >= 8 else None
    if length is None or not 2 <= length <= min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            "safetensors.bad_length",
            "A safetensors file does not begin with a plausible header length.",
            expected=f"2 to {MAX_HEADER_BYTES} bytes, within a file of {file.size} bytes",
            got="a file too short to hold one" if length is None else length,
            hint="The file is cut short or not safetensors; copy or download it again.",
            path=file.path,
        )
    return int(length)


def _load_json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        _check_amount(raw)
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "safetensors.bad_json",
            f"The header of a safetensors file cannot be read: {error}.",
            hint="The file is damaged; copy or download it again.",
            path=path,
        ) from error
    if not isinstance(body, dict):
        raise CheckpointError(
            "safetensors.not_a_table",
            "The header of a safetensors file is not a JSON object.",
            got=type(body).__name__,
            hint="The file is damaged; copy or download it again.",
            path=path,
        )
    return body


def _check_amount(raw: bytes) -> None:
    """Count before parsing: 8 MiB of brackets would become 200 MB of empty lists.

    Raises:
        ValueError: it begins with white space, or has more parts than tensors need.
    """
    if raw[:1].isspace():
        raise ValueError("it begins with white space")
    for mark, most in ((b"{", 1), (b"[", 2), (b",", 8)):
        if raw.count(mark) > most * MAX_TENSORS + 8:
            raise ValueError(f"it is too complex: it has {raw.count(mark)} times {mark.decode()!r}")


def _whole(text: str) -> int | float:
    """A number without a sign is whole: `-0` is not, though Python reads it as 0."""
    return float(text) if text.startswith("-") else int(text)


def _is_text(item: tuple[str, object]) -> bool:
    """Whether key and value are text that UTF-8 can hold: JSON may write half a character."""
    key, value = item
    try:
        return isinstance(value, str) and (key + value).encode() is not None
    except UnicodeEncodeError:
        return False


def _natural(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _parse_tensor(name: str, value: object, path: Path) -> TensorSpec:
    if not re.fullmatch(TENSOR_NAME, name):
        raise CheckpointError(
            "safetensors.bad_name",
            "A tensor has a name that coldmerge does not accept.",
            expected="letters, digits, `_`, `.` and `-`, at most 255 characters",
            got=repr(name[:80]),
            hint="Rename the tensor and save the model again.",
            path=path,
        )
    if not isinstance(value, dict) or set(value) != _KEYS or not _plausible(value):
        raise CheckpointError(
            "safetensors.bad_entry",
            f"The header entry of tensor {name} is malformed.",
            expected="dtype, shape and data_offsets",
            got=repr(value)[:120],
            hint="The file is damaged; copy or download it again.",
            path=path,
        )
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in NUMPY:
        raise CheckpointError(
            "safetensors.unknown_dtype",
            f"Tensor {name} has a type that coldmerge does not know.",
            expected=", ".join(sorted(NUMPY)),
            got=repr(dtype)[:40],
            hint="Save the model in float32, bfloat16 or float16.",
            path=path,
        )
    if stop - start != nbytes(dtype, shape):
        raise CheckpointError(
            "safetensors.size_mismatch",
            f"Tensor {name} does not have the number of bytes that its shape needs.",
            expected=f"{nbytes(dtype, shape)} bytes for {dtype} {list(shape)}",
            got=f"{stop - start} bytes",
            hint="The file is damaged; copy or download it again.",
            path=path,
        )
    return TensorSpec(name, dtype, shape, start, stop)


def _plausible(value: dict[str, Any]) -> bool:
    shape, offsets = value["shape"], value["data_offsets"]
    return (
        isinstance(value["dtype"], str)
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(_natural(extent, MAX_EXTENT) for extent in shape)
        and size([extent for extent in shape if extent]) <= MAX_ELEMENTS
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(_natural(offset, 2**62) for offset in offsets)
        and offsets[0] <= offsets[1]
    )


def _check_coverage(specs: Sequence[TensorSpec], available: int, path: Path) -> None:
    at = 0
    for spec in specs:
        if spec.start != at:
            raise CheckpointError(
                "safetensors.gap_or_overlap",
                f"Tensor {spec.name} does not begin where the one before it ends.",
                expected=f"offset {at}",
                got=f"offset {spec.start}",
                hint="The file is damaged or made to confuse; copy or download it again.",
                path=path,
            )
        at = spec.stop
    if at != available:
        raise CheckpointError(
            "safetensors.wrong_length",
            "A safetensors file is longer or shorter than its header says.",
            expected=f"{at} bytes of data",
            got=f"{available} bytes",
            hint="The file was cut short or padded; copy or download it again.",
            path=path,
        )
