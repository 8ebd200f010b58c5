"""PEFT LoRA adapter folders: factors brought to one form, delta = scaling · B @ A.

Ranks, alphas and rsLoRA are folded into `scaling` per target, with PEFT's own rules for
`rank_pattern` and `alpha_pattern`. Embedding adapters and Conv1D (GPT-2) targets change the
transpose of B@A; exchanging and transposing the factors brings them to the same form.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldmerge.core.checkpoint import read_json
from coldmerge.core.dtypes import FLOATS, NUMPY, Floats32, to_float32
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.files import PositionalFile
from coldmerge.core.header import TensorSpec, parse_header
from coldmerge.core.names import canonical

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<part>[AB])(\.[^.]+)?(\.weight)?"
)
_OTHER = re.compile(r"lora_(magnitude_vector|.*bias)|trainable_tokens|\.lora_[AB](\.[^.]+)?\.bias$")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_MOST_STEPS = math.log(3e6)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class Target:
    """One adapted module: `weight` is its weight's name as PEFT sees the model."""

    weight: str
    scaling: float
    a: str
    b: str
    transposed: bool


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter and not a model."""
    return (folder / CONFIG).is_file()


class Adapter:
    """An opened adapter folder: LoRA targets, and tensors saved whole (`modules_to_save`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG, strict=True)
        _check_supported(self.config, folder)
        self._file, self.specs, self._start = _open_weights(folder)
        self.targets = self._find_targets()
        factors = {key for target in self.targets.values() for key in (target.a, target.b)}
        self.whole = {key: spec for key, spec in self.specs.items() if key not in factors}

    def values(self, key: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of a stored tensor as float32."""
        spec = self.specs[key]
        width = NUMPY[spec.dtype].itemsize
        at = self._start + spec.start
        raw = self._file.read(at + start * width, at + stop * width)
        return to_float32(np.frombuffer(raw, NUMPY[spec.dtype]))

    def shapes(
        self, target: Target, shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the factors (A, B) against a release tensor of `shape`.

        Raises:
            TaskVectorError: the product does not have that shape.
        """
        a, b = self.specs[target.a].shape, self.specs[target.b].shape
        if len(a) == 2 and self._swapped(target, shape):
            a, b = b[::-1], a[::-1]
        b = b[:2] if all(extent == 1 for extent in b[2:]) else b
        if len(b) != 2 or not a or a[0] != b[1] or (b[0], *a[1:]) != shape:
            raise TaskVectorError(
                "adapter.shape_mismatch",
                f"The adapter of {target.weight} does not fit the release.",
                expected=f"factors of a {list(shape)} tensor",
                got=f"A {list(a)}, B {list(b)}",
                hint="Train the adapter on the release that `coldmerge pull` gives.",
                folder=self.folder,
            )
        return a, b

    def factors(self, target: Target, shape: tuple[int, ...]) -> tuple[Floats32, Floats32]:
        """The factors (A, B) in the form delta = scaling · B @ A for a tensor of `shape`."""
        a_shape, b_shape = self.shapes(target, shape)
        a, b = (self.values(key, 0, self.specs[key].size) for key in (target.a, target.b))
        if len(a_shape) == 2 and self._swapped(target, shape):
            a, b = b.reshape(a_shape[::-1]).T, a.reshape(b_shape[::-1]).T
        return np.ascontiguousarray(a.reshape(a_shape)), np.ascontiguousarray(b.reshape(b_shape))

    def _swapped(self, target: Target, shape: tuple[int, ...]) -> bool:
        if target.transposed:
            return True
        flag = bool(self.config.get("fan_in_fan_out"))
        straight = (self.specs[target.b].shape[0], *self.specs[target.a].shape[1:])
        return flag if straight == straight[::-1] else straight != shape

    def _find_targets(self) -> dict[str, Target]:
        parts: dict[str, dict[str, tuple[str, bool]]] = {}
        for key in self.specs:
            found = _FACTOR.fullmatch(key)
            if found is None or _OTHER.search(key):
                _refuse_other(key, self.folder)
                continue
            module = canonical(found["module"] + ".weight").removesuffix(".weight")
            parts.setdefault(module, {})[found["part"]] = (key, bool(found["kind"]))
        return {module: self._target(module, pair) for module, pair in sorted(parts.items())}

    def _target(self, module: str, pair: Mapping[str, tuple[str, bool]]) -> Target:
        if set(pair) != {"A", "B"}:
            raise TaskVectorError(
                "adapter.half_a_pair",
                f"The adapter of {module} has only one of its two factors.",
                expected="lora_A and lora_B",
                got=", ".join(key for key, _ in pair.values()),
                hint="Save the adapter again with `save_pretrained`.",
                folder=self.folder,
            )
        (a, embedding), (b, _) = pair["A"], pair["B"]
        try:
            ranks = _by_pattern(self.config, "rank_pattern", module, "r")
            alphas = _by_pattern(self.config, "alpha_pattern", module, "lora_alpha")
        except ValueError as error:
            raise TaskVectorError(
                "adapter.bad_config",
                f"{CONFIG} cannot be used: {error}.",
                expected='tables such as {"q_proj": 8}',
                hint="Save the adapter again with `save_pretrained`.",
                folder=self.folder,
            ) from error
        rank = next(iter(self.specs[a].shape), 0)
        if rank not in ranks:
            raise TaskVectorError(
                "adapter.rank_mismatch",
                f"The adapter of {module} has another rank than {CONFIG} says.",
                expected=" or ".join(map(str, ranks)),
                got=rank,
                hint=f"Keep {CONFIG} and {WEIGHTS} of one `save_pretrained` together.",
                folder=self.folder,
            )
        if len(set(alphas)) > 1:
            raise TaskVectorError(
                "adapter.ambiguous_alpha",
                f"Several entries of alpha_pattern match {module}; which one counted is lost.",
                expected="one match, since PEFT saves the patterns in alphabetical order",
                got=", ".join(map(str, alphas)),
                hint="Ship the merged model: `merge_and_unload()`, save it, then push that folder.",
                folder=self.folder,
            )
        scaling = float(alphas[0]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Target(f"{module}.weight", scaling, a, b, embedding)


def _by_pattern(config: dict[str, Any], patterns: str, module: str, default: str) -> list[Any]:
    """Values of the patterns that match a suffix of the module name, by PEFT's rule.

    Raises:
        ValueError: they are not a table of regular expressions and positive numbers.
    """
    table = config.get(patterns) or {}
    if not isinstance(table, dict) or not all(map(_positive, table.values())):
        raise ValueError(f"{patterns} is not a table of positive numbers")
    if slow := [pattern for pattern in table if _steps(pattern, module) > _MOST_STEPS]:
        raise ValueError(f"{patterns} has a pattern that may take for ever: {slow[0]!r:.80}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # `[[`: it will mean something else
            found = [v for pattern, v in table.items() if _matches(pattern, module)]
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise ValueError(f"{patterns} has a pattern that is not one: {error}") from error
    return found or [config[default]]


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _steps(pattern: str, module: str) -> float:
    """The logarithm of how often matching can go back and try again: a stranger wrote it."""
    plain = re.sub(r"\\.", "", pattern)
    if _REPEATED_GROUP.search(plain):
        return math.inf
    repeats, optional, choices = (sum(map(plain.count, marks)) for marks in ("*+{", "?", "|"))
    groups = plain.count("(") + 1
    ways = repeats * math.log(len(module) + 1) + optional * math.log(2)
    ways += groups * math.log(choices / groups + 1)
    return ways + math.log(module.count(".") + 1)


def _positive(value: object) -> bool:
    """Whether a value of the configuration is a positive number that a float holds."""
    if not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def _check_supported(config: dict[str, Any], folder: Path) -> None:
    init = config.get("init_lora_weights", True)
    found = [f"{key}={config[key]!r}" for key in _UNSUPPORTED if config.get(key)]
    if str(config.get("peft_type", "")).upper() != "LORA":
        found.append(f"peft_type={config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}")
    if init not in _PLAIN_INITS:
        found.append(f"init_lora_weights={init!r}")
    numbers = [config.get("r"), config.get("lora_alpha")]
    if not all(map(_positive, numbers)):
        found.append(f"r={numbers[0]!r:.40}, lora_alpha={numbers[1]!r:.40}")
    if found:
        raise TaskVectorError(
            "adapter.unsupported",
            "The adapter is of a kind that is not exactly scaling · B @ A over the release.",
            expected="LoRA or rsLoRA with bias none and an init that leaves the base as it is",
            got=", ".join(found)[:300],
            hint="Ship the merged model: `merge_and_unload()`, save it, then push that folder.",
            folder=folder,
        )


def _refuse_other(key: str, folder: Path) -> None:
    if _OTHER.search(key) or ".lora_" in key:
        raise TaskVectorError(
            "adapter.unknown_tensor",
            f"The adapter holds a tensor that plain LoRA does not have: {key}.",
            expected="lora_A, lora_B and modules_to_save",
            hint="Ship the merged model: `merge_and_unload()`, save it, then push that folder.",
            folder=folder,
        )


def _open_weights(folder: Path) -> tuple[PositionalFile, dict[str, TensorSpec], int]:
    if not (folder / WEIGHTS).is_file():
        raise TaskVectorError(
            "adapter.no_safetensors",
            f"An adapter folder has no {WEIGHTS}.",
            got=", ".join(sorted(path.name for path in folder.iterdir()))[:200],
            hint="Save it with `save_pretrained(folder)`; pickle is never read.",
            folder=folder,
        )
    file = PositionalFile(folder / WEIGHTS)
    header = parse_header(file)
    strange = sorted(k for k, spec in header.tensors.items() if spec.dtype not in FLOATS)
    if strange:
        raise TaskVectorError(
            "adapter.wrong_dtype",
            f"Tensor {strange[0]} of an adapter is not a float.",
            expected=", ".join(sorted(FLOATS)),
            got=header.tensors[strange[0]].dtype,
            hint="Save the adapter in float32 or bfloat16.",
            folder=folder,
        )
    return file, header.tensors, header.data_start
