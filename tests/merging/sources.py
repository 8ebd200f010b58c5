"""Bases and task vectors in memory, and merges of them, for the tests of merge methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coldmerge.core.dtypes import Floats32
from coldmerge.merging import Input, Job, Pool, merger_class
from coldmerge.merging.recipe import Uniform, checked

DIGEST = "12" * 32

Tensors = Mapping[str, npt.ArrayLike]


class ArraySource:
    """A base: named tensors, read by block."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name: np.array(x, np.float32) for name, x in tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def block(self, name: str, start: int, stop: int) -> Floats32:
        return self.tensors[name].reshape(-1)[start:stop].copy()


class ArrayDelta(ArraySource):
    """A task vector, with the statistics `{"kind": {tensor: values}}` it ships."""

    base_digest = DIGEST

    def __init__(self, tensors: Tensors, statistics: Mapping[str, Tensors] | None = None) -> None:
        super().__init__(tensors)
        self.statistics: dict[str, float] = {}
        self._statistics = {
            (name, kind): np.array(x, np.float32)
            for kind, found in (statistics or {}).items()
            for name, x in found.items()
        }

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def has_statistic(self, name: str, kind: str) -> bool:
        return (name, kind) in self._statistics

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        return self._statistics[name, kind].reshape(-1)[start:stop].copy()


def job(
    method: str,
    base: Tensors,
    taus: Sequence[Tensors | ArrayDelta],
    parameters: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    block: int | None = None,
    keys: Sequence[str] | None = None,
) -> Job:
    """A merge of `taus` into `base`; `keys` (default 000, 001, …) must be in sorted order."""
    cls = merger_class(method)
    names = list(keys or (f"{i:03}" for i in range(len(taus))))
    assert names == sorted(names)
    source = ArraySource(base)
    inputs = [
        Input(key, tau if isinstance(tau, ArrayDelta) else ArrayDelta(tau))
        for key, tau in zip(names, taus, strict=True)
    ]
    recipe = Uniform(
        checked(cls, parameters or {}, cls),
        tuple(checked(cls.Each, one, cls) for one in each or [{}] * len(taus)),
    )
    shapes = {name: x.shape for name, x in source.tensors.items()}
    return Job(source, shapes, inputs, recipe, block)


def merged(
    method: str,
    base: Tensors,
    taus: Sequence[Tensors | ArrayDelta],
    parameters: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    threads: int = 1,
    block: int | None = None,
    keys: Sequence[str] | None = None,
) -> dict[str, Floats32]:
    """The merged weights of every tensor that an input changes, in the tensors' shapes."""
    work = job(method, base, taus, parameters, each, block, keys)
    out = {name: np.empty(work.size(name), np.float32) for name in work.names}
    with Pool(threads) as pool:
        work.survey(pool)
        for name, values in out.items():

            def put(start: int, part: Floats32, values: Floats32 = values) -> None:
                values[start : start + len(part)] = part

            work.tensor(name, pool, put)
    return {name: values.reshape(np.shape(base[name])) for name, values in out.items()}
