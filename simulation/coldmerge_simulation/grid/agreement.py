"""Whether arrays of a Flower strategy are the tensors of a release, up to rounding."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt

from coldmerge.core.dtypes import NUMPY
from coldmerge.core.errors import ConflictError, DataError

Arrays = Mapping[str, npt.NDArray[np.float32]]
SHOWN = 3


def allowed(largest: float, dtype: str, inputs: int) -> float:
    """How far a weight may be off in a tensor whose largest weight is `largest`.

    A sum of `inputs` products in float32 rounds that often, the division before it and the
    release's own fp32 once more; then comes the rounding to the published type.
    """
    off = (inputs + 2) * float(np.spacing(np.float32(largest)))
    return off if dtype == "F32" else off + largest * float(ml_dtypes.finfo(NUMPY[dtype]).eps)


def check_tensors(arrays: Arrays, model: Arrays) -> None:
    """Make sure that `arrays` are the tensors of `model`, of its shapes, and finite.

    Raises:
        DataError: `grid.other_tensors`, `grid.other_shape` or `grid.not_finite`.
    """
    if set(arrays) != set(model):
        raise DataError(
            "grid.other_tensors",
            "The strategy's arrays are not the model's tensors.",
            expected=_some(set(model) - set(arrays)) or f"these {len(model)} and no other",
            got=_some(set(arrays) - set(model)) or "nothing in their place",
            hint="Start from grid.arrays(): private tensors and integers are not in it.",
        )
    for name, array in arrays.items():
        if array.shape != model[name].shape:
            raise DataError(
                "grid.other_shape",
                f"The strategy's array {name} has another shape than the model's tensor.",
                expected=model[name].shape,
                got=array.shape,
                hint="Start from grid.arrays(), and keep the shapes.",
            )
        if not np.isfinite(array).all():
            raise DataError(
                "grid.not_finite",
                f"The strategy's array {name} holds a value that is not finite.",
                hint="Look at the strategy: contributions with such values are not admitted.",
            )


def check_same(
    arrays: Arrays, model: Arrays, dtypes: Mapping[str, str], *, inputs: int, what: str, name: str
) -> None:
    """Make sure that `arrays` are `model`, merged from `inputs`; `name` says which `what` it is.

    Raises:
        DataError: see `check_tensors`.
        ConflictError: a weight is off by more than rounding explains.
    """
    check_tensors(arrays, model)
    for key, ours in model.items():
        theirs = arrays[key]
        largest = max(_largest(ours), _largest(theirs))
        limit, off = allowed(largest, dtypes[key], inputs), _difference(theirs, ours)
        if off > limit:
            raise ConflictError(
                "grid.other_arrays",
                f"The strategy's arrays are not the {what} that the coordinator made: "
                f"{key} differs.",
                expected=f"{name}, to within {limit:.3g}",
                got=f"a difference of {off:.3g}",
                hint="Start from grid.arrays(), and give the grid the recipe that the strategy "
                'computes: policy={"merge": {"method": ...}}.',
            )


def largest_difference(arrays: Arrays, model: Arrays) -> float:
    """The largest difference of a weight."""
    return max((_difference(arrays[name], ours) for name, ours in model.items()), default=0.0)


def _difference(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.max(np.abs(one - other), initial=0.0))


def _largest(array: npt.NDArray[np.float32]) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _some(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:SHOWN])
    return f"{listed}, …" if len(names) > SHOWN else listed
