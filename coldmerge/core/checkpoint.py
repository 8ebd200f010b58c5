"""Model folders in the Hugging Face layout, read a block at a time and written atomically.

Reading uses pread into fresh buffers: the resident memory of a reader is the block it
holds, however large the model. Only what is in the files exists: tied weights that were
saved once are one tensor here too.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from coldmerge.core import strict_json
from coldmerge.core.checkpoint_writer import INDEX as INDEX
from coldmerge.core.checkpoint_writer import SINGLE as SINGLE
from coldmerge.core.checkpoint_writer import CheckpointWriter as CheckpointWriter
from coldmerge.core.dtypes import FLOATS, NUMPY, Floats32, to_float32
from coldmerge.core.errors import CheckpointError, NotFoundError
from coldmerge.core.files import PositionalFile
from coldmerge.core.header import Header, TensorSpec, parse_header

MAX_JSON_BYTES = 64 * 2**20

RELEASE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "modules.json",
    "config_sentence_transformers.json",
)
"""Files beside the weights that belong to a release. Never code, never pickle."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


class Checkpoint:
    """A model folder: `model.safetensors`, or shards with an index, and its configuration."""

    def __init__(self, folder: Path, shards: dict[str, tuple[PositionalFile, Header]]) -> None:
        self.folder = folder
        places = {
            name: (spec, file, header.data_start + spec.start)
            for file, header in shards.values()
            for name, spec in header.tensors.items()
        }
        self._places = dict(sorted(places.items()))
        self.tensors: dict[str, TensorSpec] = {n: place[0] for n, place in self._places.items()}

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return type(self).open, (self.folder.absolute(),)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a folder and check every header in it.

        Raises:
            CheckpointError: no safetensors in it, a shard is missing or damaged, or the
                index does not tell the truth.
        """
        folder = Path(folder)
        if (folder / SINGLE).is_file():
            file = PositionalFile(folder / SINGLE)
            return cls(folder, {SINGLE: (file, parse_header(file))})
        if (folder / INDEX).is_file():
            return cls(folder, _open_shards(folder))
        raise CheckpointError(
            "checkpoint.no_safetensors",
            "A model folder has no safetensors weights.",
            expected=f"{SINGLE}, or shards with {INDEX}",
            got=_what_is_there(folder),
            hint="Save the model with `model.save_pretrained(folder)`; pickle is never read.",
            folder=folder,
        )

    def _place(self, name: str) -> tuple[TensorSpec, PositionalFile, int]:
        try:
            return self._places[name]
        except KeyError:
            raise NotFoundError(
                "checkpoint.no_such_tensor",
                f"There is no tensor {name} in the model folder.",
                hint="List what is there with `coldmerge release show`, or open config.json.",
                folder=self.folder,
            ) from None

    def dtype(self, name: str) -> str:
        """The safetensors type of a tensor, such as `BF16`."""
        return self._place(name)[0].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; () for a scalar."""
        return self._place(name)[0].shape

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """A tensor in its own type and shape, memory-mapped, read-only."""
        spec, file, offset = self._place(name)
        if spec.nbytes == 0:
            return np.zeros(spec.shape, NUMPY[spec.dtype])
        raw = np.memmap(file.path, np.uint8, "r", offset, (spec.nbytes,))
        return raw.view(NUMPY[spec.dtype]).reshape(spec.shape)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened tensor as float32, shape (stop - start,).

        Raises:
            CheckpointError: the tensor is a buffer, not F32, F16 or BF16.
        """
        spec, file, offset = self._place(name)
        if spec.dtype not in FLOATS:
            raise CheckpointError(
                "checkpoint.not_float",
                f"Tensor {name} is a buffer and has no float32 values.",
                expected=", ".join(sorted(FLOATS)),
                got=spec.dtype,
                hint="Copy buffers with `raw`; they are never merged.",
                folder=self.folder,
            )
        kind = NUMPY[spec.dtype]
        start, stop, _ = slice(start, stop).indices(spec.size)
        out = np.empty(max(stop - start, 0) * kind.itemsize, np.uint8)
        file.read_into(out.data, offset + start * kind.itemsize)
        return to_float32(out.view(kind))

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Bytes [start, stop) of a tensor."""
        spec, file, offset = self._place(name)
        start, stop, _ = slice(start, stop).indices(spec.nbytes)
        return file.read(offset + start, offset + max(start, stop))

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            CheckpointError: it is missing or not a JSON object.
        """
        return read_json(self.folder / "config.json")

    def files(self) -> list[Path]:
        """The files beside the weights that a release carries, relative, sorted.

        `RELEASE_FILES` in the folder itself, and `config.json` one folder down (such as
        the `1_Pooling/config.json` of sentence-transformers).
        """
        found = [
            path
            for path in self.folder.iterdir()
            if any(fnmatchcase(path.name, pattern) for pattern in RELEASE_FILES)
        ]
        found += self.folder.glob("*/config.json")
        relative = [path.relative_to(self.folder) for path in found if path.is_file()]
        plain = (path for path in relative if all(map(_FILE_NAME.fullmatch, path.parts)))
        return sorted((p for p in plain if p.name != INDEX), key=Path.as_posix)


def read_json(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    `strict` is for files that decide what tensors mean: see `strict_json`.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        raw = path.read_bytes()
        body = strict_json.loads(raw) if strict else json.loads(raw)
        if not isinstance(body, dict):
            raise TypeError(f"it is a {type(body).__name__}, not an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            "checkpoint.bad_json",
            f"{path.name} cannot be read: {reason}.",
            expected="a JSON object",
            hint="Save the model again with `save_pretrained`, tokenizer and configuration too.",
            path=path,
        ) from error
    return body


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "") or "an empty folder"


def _open_shards(folder: Path) -> dict[str, tuple[PositionalFile, Header]]:
    weight_map = read_json(folder / INDEX, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and _FILE_NAME.fullmatch(file) for file in weight_map.values()
    ):
        raise CheckpointError(
            "checkpoint.bad_index",
            f"{INDEX} does not map tensor names to files of its folder.",
            expected='"weight_map": {"tensor": "file.safetensors", …}',
            hint="Save the model again with `save_pretrained`.",
            folder=folder,
        )
    shards = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise CheckpointError(
                "checkpoint.missing_shard",
                f"{INDEX} names a file that is not there.",
                expected=name,
                got=_what_is_there(folder),
                hint="Copy or download the missing shard.",
                folder=folder,
            )
        file = PositionalFile(folder / name)
        shards[name] = (file, parse_header(file))
    _check_index(folder, weight_map, {name: shard[1] for name, shard in shards.items()})
    return shards


def _check_index(folder: Path, weight_map: dict[str, str], headers: dict[str, Header]) -> None:
    listed = sorted(weight_map.items())
    present = sorted((tensor, file) for file, h in headers.items() for tensor in h.tensors)
    if listed != present:
        wrong = min(set(listed) ^ set(present))
        raise CheckpointError(
            "checkpoint.index_lies",
            f"{INDEX} and the shards disagree about tensor {wrong[0]}.",
            expected=sorted(file for tensor, file in listed if tensor == wrong[0]) or "nowhere",
            got=sorted(file for tensor, file in present if tensor == wrong[0]) or "nowhere",
            hint="Save the model again with `save_pretrained`.",
            folder=folder,
        )
