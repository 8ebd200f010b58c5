"""LoRA task vectors merged into one adapter: by their factors, never averaging A and B.

Σ wᵢsᵢBᵢAᵢ is [B₁ … Bₙ] · [w₁s₁A₁; …; wₙsₙAₙ], exactly: `lora_cat` writes these factors, of
rank Σr. `lora_svd` brings them back to rank r with the least error there is, by QR of both
and the SVD of the small core between; no matrix of the model's size is formed. Averaging A
and B instead would add cross terms BᵢAⱼ that no input has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from coldmerge.core.adapter_writer import check_free, write_adapter
from coldmerge.core.algebra import check_fits, common_base, round_once
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.comparison import not_finite
from coldmerge.core.dtypes import Floats64, size
from coldmerge.core.errors import ConfigError
from coldmerge.core.low_rank import Factored
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge.core.task_vector import TaskVector
from coldmerge.core.threads import one_blas_thread
from coldmerge.core.vector_writer import VectorWriter
from coldmerge.merging.engine import in_order
from coldmerge.merging.sources import Input

Method = Literal["lora_cat", "lora_svd"]
Pair = tuple[Floats64, Floats64]

_CANCELLED = 1e-12
"""A sum of this share of its terms is the rounding of a zero."""


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter folder, and what each of its tensors lost against Σ wᵢsᵢBᵢAᵢ."""

    folder: Path
    tensors: tuple[Factored, ...]

    @property
    def relative_error(self) -> float:
        """‖Σ wᵢsᵢBᵢAᵢ − s·BA‖ / ‖Σ wᵢsᵢBᵢAᵢ‖ over all tensors, in the Frobenius norm."""
        lost = math.hypot(*(one.error for one in self.tensors))
        return lost / math.hypot(*(one.norm for one in self.tensors))


def merge_adapters(
    base: Checkpoint,
    inputs: Sequence[Input],
    out: Path | str,
    *,
    method: Method = "lora_cat",
    rank: int | None = None,
    alpha: float | None = None,
    normalize: bool = False,
    encoding: str = "fp32",
    progress: Progress = silent,
) -> MergedAdapter:
    """Merge `inputs`, LoRA task vectors against `base`, into the PEFT adapter folder `out`.

    The result stands for Σ wᵢsᵢBᵢAᵢ with the inputs' weights, divided by their sum with
    `normalize`; α and rsLoRA are in sᵢ. `rank` is for `lora_svd`, by default the largest of
    the inputs; a matrix with a smaller side gets that. `alpha` goes into the configuration
    (default: the largest rank written) and changes no product. A tensor whose sum is zero
    is left out. The errors told are those of the factors as stored in `encoding`.

    Raises:
        ConfigError: an input has tensors that are no factors, or the parameters are unusable.
        TaskVectorError: an input does not fit the base, or a value is NaN or infinite.
        ConflictError: `out` exists and is not empty.
    """
    out = Path(out)
    check_free(out)
    ordered = in_order(inputs)
    vectors = [_vector(item) for item in ordered]
    digest = common_base(vectors)
    for vector in vectors:
        check_fits(base, vector)
    weights = _weights([item.weight for item in ordered], normalize)
    terms = _Terms([_Term(*term) for term in zip(map(str, ordered), vectors, weights, strict=True)])
    ranks = terms.ranks(method, rank)
    alpha = float(max(ranks.values())) if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise _bad_parameter("alpha", "above 0", alpha)
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=folder) as scratch:
        path = Path(scratch) / "merged.safetensors"
        vector, tensors = _Writing(terms, ranks, alpha, encoding, progress).write(path, digest)
        write_adapter(vector, base, out, max(one.rank for one in tensors), alpha)
    return MergedAdapter(out, tensors)


@dataclass(frozen=True)
class _Term:
    """One input: its name in messages, its factors, its weight in the sum."""

    label: str
    vector: TaskVector
    weight: float

    def rank(self, name: str) -> int:
        return self.vector.specs[f"{name}.lora_A"].shape[0]

    def factors(self, name: str) -> Pair:
        """A (r, columns), weight and scaling in it, and B (rows, r), float64.

        Raises:
            TaskVectorError: a value is NaN or infinite.
        """
        found = []
        for part in "AB":
            spec = self.vector.specs[f"{name}.lora_{part}"]
            values = self.vector.stored(spec.name, 0, spec.size)
            if not np.isfinite(values).all():
                raise not_finite(spec.name, self.label)
            found.append(values.reshape(spec.shape[0], -1).astype(np.float64))
        found[0] *= self.weight * self.vector.scaling[name]
        return found[0], found[1]


class _Terms:
    """The inputs, and the factors of their sum, tensor by tensor."""

    def __init__(self, terms: Sequence[_Term]) -> None:
        self._terms = terms
        names = frozenset[str]().union(*(term.vector.names for term in terms))
        self.names = tuple(sorted(names, key=lambda name: f"{name}.lora_A"))
        self.shapes = {n: term.vector.shape(n) for term in terms for n in term.vector.names}

    def _of(self, name: str) -> list[_Term]:
        return [term for term in self._terms if name in term.vector.names]

    def ranks(self, method: Method, rank: int | None) -> dict[str, int]:
        """The rank that each tensor gets.

        Raises:
            ConfigError: the rank is unusable, or given for a concatenation.
        """
        own = {name: [term.rank(name) for term in self._of(name)] for name in self.names}
        if method == "lora_cat":
            if rank is not None:
                raise _bad_parameter("rank", "none: lora_cat has the sum of the ranks", rank)
            return {name: sum(found) for name, found in own.items()}
        if rank is not None and rank < 1:
            raise _bad_parameter("rank", "at least 1", rank)
        wanted = rank or max(max(found) for found in own.values())
        return {
            name: min(wanted, sum(found), self.shapes[name][0], size(self.shapes[name][1:]))
            for name, found in own.items()
        }

    def factors(self, name: str) -> Pair:
        """A (Σr, columns), weights and scalings in it, and B (rows, Σr) of the sum, float64."""
        pairs = [term.factors(name) for term in self._of(name)]
        return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs], axis=1)


class _Writing:
    """One pass over the tensors, into a task vector whose scalings are alpha over the rank."""

    def __init__(
        self,
        terms: _Terms,
        ranks: dict[str, int],
        alpha: float,
        encoding: str,
        progress: Progress,
    ) -> None:
        self._terms, self._ranks, self._alpha = terms, ranks, alpha
        self._encoding = encoding
        self._count = Counter("merge", len(terms.names), progress)

    def write(self, path: Path, digest: str) -> tuple[TaskVector, tuple[Factored, ...]]:
        """Write the factors to `path`.

        Raises:
            ConfigError: nothing is left.
            TaskVectorError: a value is NaN or infinite.
        """
        tensors = []
        with (
            one_blas_thread(),
            VectorWriter(
                path,
                [stored for name in self._terms.names for stored in self._stored(name)],
                kind="lora",
                encoding=self._encoding,
                base_digest=digest,
                scaling={name: self._alpha / rank for name, rank in self._ranks.items()},
            ) as writer,
        ):
            for name in self._terms.names:
                one = self._tensor(name, writer)
                tensors += [one] if one.norm else []
                self._count.add(1)
            if not tensors:
                raise ConfigError(
                    "merge.nothing_left",
                    "The weighted sum of the adapters is zero in every tensor.",
                    expected="at least one tensor that changes",
                    hint="Look at the weights: zeros, or equal adapters that cancel.",
                )
        return writer.open(), tuple(tensors)

    def _stored(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        rank, shape = self._ranks[name], self._terms.shapes[name]
        return [(f"{name}.lora_A", (rank, *shape[1:])), (f"{name}.lora_B", (shape[0], rank))]

    def _tensor(self, name: str, writer: VectorWriter) -> Factored:
        rank = self._ranks[name]
        exact = self._terms.factors(name)
        norm = _norm(exact)
        if norm <= _CANCELLED * float(np.linalg.norm(exact[0]) * np.linalg.norm(exact[1])):
            return Factored(name, rank, 0.0, 0.0)
        a, b = exact if rank == len(exact[0]) else truncated(exact, rank)
        scaling = self._alpha / rank
        a = a if scaling == 1 else a / scaling
        kept = [writer.as_stored(round_once(name, factor)) for factor in (a, b)]
        for values, (key, shape) in zip(kept, self._stored(name), strict=True):
            writer.append(values.reshape(-1))
            writer.keep(key, shape)
        stored = kept[0].astype(np.float64) * scaling, kept[1].astype(np.float64)
        rest = np.concatenate([exact[0], stored[0]]), np.concatenate([exact[1], -stored[1]], axis=1)
        return Factored(name, rank, norm, _norm(rest))


def truncated(factors: Pair, rank: int) -> Pair:
    """The A (rank, columns) and B (rows, rank) whose product is the nearest to that given.

    In the Frobenius norm; singular values are shared, and of each column of B the entry
    largest in magnitude is positive.
    """
    a, b = factors
    rows, inner = np.linalg.qr(b)
    columns, outer = np.linalg.qr(a.T)
    left, values, right = np.linalg.svd(inner @ outer.T)
    roots = np.sqrt(values[:rank])
    image = rows @ (left[:, :rank] * roots)
    peaks = np.abs(image).argmax(axis=0)
    signs = np.where(image[peaks, np.arange(rank)] < 0, -1.0, 1.0)
    return (right[:rank] * (roots * signs)[:, None]) @ columns.T, image * signs


def _norm(factors: Pair) -> float:
    """‖BA‖ in the Frobenius norm, from the triangles of B and Aᵀ."""
    inner, outer = (np.linalg.qr(factor).R for factor in (factors[1], factors[0].T))
    return float(np.linalg.norm(inner @ outer.T))


def _vector(item: Input) -> TaskVector:
    """The task vector of an input, all of whose tensors are factors.

    Raises:
        ConfigError: it is something else.
    """
    source = item.source
    is_lora = source.is_lora if isinstance(source, TaskVector) else lambda _: False
    whole = sorted(name for name in source.names if not is_lora(name))
    if whole or not isinstance(source, TaskVector):
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        raise ConfigError(
            "merge.not_lora",
            f"{item} changes {', '.join(whole[:3])}{more} as a whole, which no adapter holds.",
            expected="inputs with LoRA factors only",
            hint="Merge into a model with `mean`, or extract with `--rank` first.",
            input=item,
        )
    return source


def _weights(weights: Sequence[float], normalize: bool) -> list[float]:
    total = math.fsum(weights) if normalize else 1.0
    if abs(total) < 1e-8 or not all(map(math.isfinite, weights)):
        raise ConfigError(
            "merge.weights_sum_to_zero",
            "The weights of a merge sum to zero, so they cannot be normalized.",
            expected="finite weights, with a sum other than zero",
            got=", ".join(f"{weight:g}" for weight in weights),
            hint="Set `normalize: false`, or change a weight.",
        )
    return [weight / total for weight in weights]


def _bad_parameter(name: str, expected: str, got: object) -> ConfigError:
    return ConfigError(
        "merge.bad_parameter",
        f"LoRA factors cannot be merged with this {name}.",
        expected=expected,
        got=got,
        hint="Leave it out: the largest rank of the inputs is taken, and its alpha.",
        parameter=name,
    )
