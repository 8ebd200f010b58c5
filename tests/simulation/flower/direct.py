"""Flower's strategies run by themselves, on messages built here: what ours is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coldmerge_simulation.flower import compat

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


def replies(clients: Sequence[Arrays], weights: Sequence[float] | None = None) -> list[Any]:
    """What `clients` would answer with."""
    found = []
    for number, arrays in enumerate(clients):
        metrics = {"num-examples": 1 if weights is None else weights[number]}
        content = compat.RecordDict(
            {
                "arrays": compat.ArrayRecord(
                    {name: compat.Array(np.ascontiguousarray(a)) for name, a in arrays.items()}
                ),
                "metrics": compat.MetricRecord(metrics),
            }
        )
        found.append(compat.message(content, "train", source=number + 2))
    return found


def aggregated(
    strategy: Any,
    clients: Sequence[Arrays],
    weights: Sequence[float] | None = None,
    number: int = 1,
) -> dict[str, Array]:
    """The arrays that a strategy makes of those of its clients."""
    with compat.muted():
        arrays, _ = strategy.aggregate_train(number, replies(clients, weights))
    return {name: item.numpy() for name, item in arrays.items()}


def told(strategy: Any, arrays: Arrays) -> None:
    """Tell an optimizer what the clients start from, as its `configure_train` would."""
    if isinstance(strategy, compat.strategy.FedAvgM):
        if strategy.current_arrays is None:
            record = {name: compat.Array(values) for name, values in arrays.items()}
            strategy.current_arrays = compat.ArrayRecord(record)
    else:
        strategy.current_arrays = dict(arrays)


def ulps(found: Array, expected: Array, operands: Sequence[Array] = ()) -> float:
    """The largest difference in float32's units of the last place of `expected`.

    With `operands`, of the largest of these and `expected` in each element: a sum that cancels
    cannot be more exact than what it is made of.
    """
    largest = np.abs(expected.astype(np.float32))
    for operand in operands:
        largest = np.maximum(largest, np.abs(operand.astype(np.float32)))
    apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return float((apart / np.spacing(largest).astype(np.float64)).max(initial=0))
