"""Writing a `lora` task vector as the adapter folder that PEFT loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldmerge.core.adapters import CONFIG, WEIGHTS
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.dtypes import as_bytes, from_float32
from coldmerge.core.errors import ConflictError
from coldmerge.core.files import fsync_path, partial_path, preallocate, write_all
from coldmerge.core.header import TensorSpec, layout, render_header
from coldmerge.core.task_vector import TaskVector

_EMBEDDING = re.compile(
    r"(\w*_)?(emb|embed|embeds|embedding|embeddings)(_(\w*tokens|positions|in|layer|table))?"
    r"|wte|wpe|shared|relative_attention_bias"
)


def write_adapter(
    vector: TaskVector, base: Checkpoint, folder: Path, rank: int, alpha: float
) -> None:
    """Write `vector`, whose tensors are all factors, as a PEFT adapter of `base`.

    `rank` and `alpha` go into the configuration; a tensor of another rank into its
    `rank_pattern`. Every scaling is alpha over the tensor's rank. The folder appears whole.

    Raises:
        ConflictError: `folder` exists and is not empty.
    """
    check_free(folder)
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        transposed = _transposed(base)
        _write_weights(vector, partial / WEIGHTS, transposed)
        config = _config(vector, base, rank, alpha, bool(transposed))
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for path in (partial / CONFIG, partial):
            fsync_path(path)
        partial.rename(folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_embedding(name: str) -> bool:
    """Whether tensor `name` is the table of an embedding, as far as its name tells."""
    last = _module(name).rpartition(".")[2]
    return name.endswith(".weight") and _EMBEDDING.fullmatch(last) is not None


def check_free(folder: Path) -> None:
    """Check that nothing would be overwritten by writing `folder`.

    Raises:
        ConflictError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(
            "weights.out_exists",
            f"{folder} exists already.",
            expected="a new name, or an empty folder for an adapter",
            hint="Choose another name, or move this one away.",
        )


@dataclass(frozen=True)
class _Factor:
    """One stored factor: PEFT's key and shape for it, and the vector's key and form."""

    key: str
    shape: tuple[int, ...]
    source: str
    turned: bool


def _factors_of(vector: TaskVector, name: str, transposed: bool) -> list[_Factor]:
    """A and B as PEFT stores them: modules that hold the transpose swap and transpose them.

    Embeddings are among those; B of a convolution is a kernel of one pixel.
    """
    prefix = f"base_model.model.{_module(name)}.lora_"
    a, b = (vector.specs[f"{name}.lora_{part}"] for part in "AB")
    if is_embedding(name):
        keys, transposed = (f"{prefix}embedding_A", f"{prefix}embedding_B"), True
    else:
        keys = (f"{prefix}A.weight", f"{prefix}B.weight")
    if transposed:
        return [
            _Factor(keys[0], b.shape[::-1], b.name, turned=True),
            _Factor(keys[1], a.shape[::-1], a.name, turned=True),
        ]
    kernel = (*b.shape, *(1 for _ in a.shape[2:]))
    return [
        _Factor(keys[0], a.shape, a.name, turned=False),
        _Factor(keys[1], kernel, b.name, turned=False),
    ]


def _write_weights(vector: TaskVector, path: Path, transposed: frozenset[str]) -> None:
    """The factors under PEFT's names."""
    factors = [
        factor
        for name in sorted(vector.names)
        for factor in _factors_of(vector, name, name in transposed)
    ]
    dtype = {factor.key: vector.specs[factor.source].dtype for factor in factors}
    places = layout([TensorSpec(f.key, dtype[f.key], f.shape, 0, 0) for f in factors])
    header = render_header(places, {"format": "pt"})
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        preallocate(fd, len(header) + places[-1].stop)
        write_all(fd, header, 0)
        at = len(header)
        for factor in factors:
            spec = vector.specs[factor.source]
            values = vector.stored(spec.name, 0, spec.size).reshape(spec.shape)
            values = values.T if factor.turned else values
            data = as_bytes(from_float32(values.copy(order="C"), spec.dtype))
            write_all(fd, data, at)
            at += len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _transposed(base: Checkpoint) -> frozenset[str]:
    """The matrices stored as (in, out), as GPT-2's Conv1D has them.

    The bias tells: it is as long as the outputs. A square matrix tells nothing, and is taken
    for one where other matrices with a bias are.
    """
    found, square = set(), set()
    for name, spec in base.tensors.items():
        bias = base.tensors.get(f"{_module(name)}.bias")
        if bias is None or len(spec.shape) != 2 or len(bias.shape) != 1:
            continue
        if spec.shape[0] == spec.shape[1]:
            square.add(name)
        elif bias.shape[0] == spec.shape[1]:
            found.add(name)
    return frozenset(found | square if found else ())


def _config(
    vector: TaskVector, base: Checkpoint, rank: int, alpha: float, transposed: bool
) -> dict[str, Any]:
    modules = sorted(map(_module, vector.names))
    ranks = {
        _module(name): vector.specs[f"{name}.lora_A"].shape[0] for name in sorted(vector.names)
    }
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": str(base.folder),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "target_modules": _short(modules, base),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _short(modules: list[str], base: Checkpoint) -> list[str]:
    """The last parts of the modules' names, where these name no other matrix of the base."""
    short = {_last(module) for module in modules}
    named: Iterable[str] = (
        _module(name)
        for name, spec in base.tensors.items()
        if name.endswith(".weight") and len(spec.shape) > 1 and _last(_module(name)) in short
    )
    return sorted(short) if set(named) == set(modules) else modules


def _last(module: str) -> str:
    return module.rpartition(".")[2]
