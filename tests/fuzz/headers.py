"""Strangers' safetensors files: model folders, task vectors, adapters."""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from coldmerge.core.adapters import CONFIG, WEIGHTS, Adapter
from coldmerge.core.checkpoint import INDEX, SINGLE, Checkpoint
from coldmerge.core.errors import CheckpointError, IntegrityError, TaskVectorError
from coldmerge.core.task_vector import TaskVector
from tests.fuzz.engine import Verdict, demand

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "C64": 64,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
TOKENS = (
    *(b'"dtype":"F32"', b'"dtype":"BF16"', b'"shape":[]', b'"shape":[0]', b'"data_offsets":[0,0]'),
    *(b'"__metadata__":{"a":"b"},', b'"__metadata__":', b'"../../etc/passwd"', b"F8_E8M0", b"C64"),
    *(b'"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', b".lora_A", b".lora_B", b".gram"),
)


@cache
def scratch() -> Path:
    """A folder in memory that ends with the process."""
    memory = Path("/dev/shm")  # noqa: S108
    kept = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def clear_scratch() -> None:
    """Remove the folder at once, for a process that ends without cleaning up."""
    while _KEPT:
        _KEPT.pop().cleanup()


def put(name: str, data: bytes) -> Path:
    """A scratch file with these bytes."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def repair(data: bytearray, random: Random) -> bytes:
    """Write the true length of the JSON in front of it, most of the time."""
    end = data.rfind(b"}") + 1
    if end > 8 and random.random() < 0.8:
        data[:8] = struct.pack("<Q", end - 8)
    return bytes(data)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    demand(len({key for key, _ in pairs}) == len(pairs), "a key stands twice")
    return dict(pairs)


def _not_json(text: str) -> object:
    demand(False, f"{text} is not JSON")
    return None


def check_file(data: bytes) -> dict[str, Any]:
    """What the file holds, by an independent reading of the format.

    Raises:
        WrongAcceptanceError: it is malformed, or safetensors' own reader refuses it.
    """
    length = int.from_bytes(data[:8], "little")
    demand(len(data) >= 8 + length and data[8:9] == b"{", "no header")
    text = data[8 : 8 + length].decode("utf-8")
    body = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_not_json)
    body.pop("__metadata__", None)
    _check_ranges(body, len(data) - 8 - length)
    _check_with_safetensors(data, set(body))
    return dict(body)


def _check_ranges(body: dict[str, Any], available: int) -> None:
    at = 0
    for name, entry in sorted(body.items(), key=lambda item: item[1]["data_offsets"]):
        demand(NAME.fullmatch(name), f"{name!r} is no plain name")
        start, stop = entry["data_offsets"]
        demand(all(type(x) is int and x >= 0 for x in (start, stop, *entry["shape"])), "no number")
        demand(start == at, "a gap or an overlap")
        demand((stop - start) * 8 == math.prod(entry["shape"]) * BITS[entry["dtype"]], "a size")
        at = stop
    demand(at == available, "too long or too short")


def _check_with_safetensors(data: bytes, names: set[str]) -> None:
    path = put("theirs.safetensors", data)
    try:
        with safe_open(str(path), "np") as theirs:
            demand(set(theirs.keys()) == names, "safetensors sees other tensors")
    except SafetensorError as error:
        demand(False, f"safetensors refuses it: {error}")


def checkpoint(data: bytes) -> Verdict:
    """A model folder with one file: opened, and every tensor read in both ways."""
    path = put(f"model/{SINGLE}", data)
    try:
        found = Checkpoint.open(path.parent)
    except (CheckpointError, IntegrityError):
        return Verdict.REFUSED
    demand(set(check_file(data)) == set(found.tensors), "other tensors")
    for name, spec in found.tensors.items():
        demand(found.array(name).nbytes == spec.nbytes == len(found.raw(name)), "other bytes")
    return Verdict.ACCEPTED


def shards(data: bytes) -> Verdict:
    """A model folder whose index is the input; there are two sound shards beside it."""
    folder = scratch() / "sharded"
    if not folder.is_dir():
        for name in ("a", "b"):
            put(f"sharded/{name}.safetensors", safetensors_file({name: ("F32", [2], 8)}))
    (folder / INDEX).write_bytes(data)
    try:
        found = Checkpoint.open(folder)
    except CheckpointError:
        return Verdict.REFUSED
    told = json.loads(data, object_pairs_hook=_no_twice)["weight_map"]
    demand(set(found.tensors) == set(told) <= {"a", "b"}, "other tensors")
    demand(all(file == f"{name}.safetensors" for name, file in told.items()), "it lies")
    return Verdict.ACCEPTED


def task_vector(data: bytes) -> Verdict:
    """A task vector: opened, its entries listed, its deltas read."""
    path = put("vector.safetensors", data)
    try:
        vector = TaskVector.open(path)
    except (CheckpointError, TaskVectorError, IntegrityError):
        return Verdict.REFUSED
    body = check_file(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    _check_metadata(metadata)
    width = {"fp32": "F32", "bf16": "BF16"}[metadata["coldmerge.encoding"]]
    counted = json.loads(metadata.get("coldmerge.statistics", "{}"))
    for name, entry in body.items():
        expected = "F32" if name.rpartition(".")[2] in counted else width
        demand(entry["dtype"] == expected, f"{name} is of another type")
    demand(len(vector.entries()) == len(body), "entries are missing")
    for name in sorted(vector.names):
        shape = vector.shape(name)
        with np.errstate(all="ignore"):
            block = vector.block(name, 0, min(math.prod(shape), 64))
        demand(len(block) == min(math.prod(shape), 64), "a block of another length")
    return Verdict.ACCEPTED


def _check_metadata(metadata: dict[str, str]) -> None:
    demand(metadata["coldmerge.kind"] in ("full", "lora"), "the kind")
    demand(re.fullmatch(r"([0-9a-f]{64})?", metadata["coldmerge.base_digest"]), "the base's digest")
    for key in ("coldmerge.scaling", "coldmerge.statistics"):
        table = json.loads(metadata.get(key, "{}"), object_pairs_hook=_no_twice)
        demand(
            all(type(v) in (int, float) and math.isfinite(v) for v in table.values()),
            f"{key} is no table of numbers",
        )


def adapter(data: bytes) -> Verdict:
    """An adapter folder: the input is its configuration, a NUL byte, and its weights."""
    config, _, weights = data.partition(b"\x00\x00\x00\x01")
    put(f"adapter/{CONFIG}", config)
    path = put(f"adapter/{WEIGHTS}", weights)
    try:
        found = Adapter(path.parent)
        for target in found.targets.values():
            a, b = found.specs[target.a].shape, found.specs[target.b].shape
            found.shapes(target, (b[0] if b else 0, *a[1:]))
    except (CheckpointError, TaskVectorError, IntegrityError):
        return Verdict.REFUSED
    check_file(weights)
    told = json.loads(config, object_pairs_hook=_no_twice, parse_constant=_not_json)
    demand(told["peft_type"].upper() == "LORA" and not told.get("use_dora"), "not plain LoRA")
    for target in found.targets.values():
        demand(math.isfinite(target.scaling) and target.scaling > 0, "its scaling")
    return Verdict.ACCEPTED


def repair_adapter(data: bytearray, random: Random) -> bytes:
    """`repair` on the weights behind the configuration."""
    config, mark, weights = bytes(data).partition(b"\x00\x00\x00\x01")
    return config + mark + repair(bytearray(weights), random)


def safetensors_file(
    tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """A sound file of zeros: name → (dtype, shape, bytes)."""
    body: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        body[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(at)
