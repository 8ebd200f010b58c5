"""Methods that say that they are linear in the weights of their inputs are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from coldmerge.core.errors import ColdmergeError
from coldmerge.merging import merger, merger_class, method_names
from coldmerge.merging.outer import outer, outer_names
from tests.merging.sources import merged

WEIGHTS = ([0.3, 0.5, 0.2], [0.4, 0.1, 0.7])
SPARSE = {"density": 0.5}
DRAW = np.random.default_rng(0)
BASE, *TAUS = (
    {"w": DRAW.normal(size=(6, 8)), "bias": DRAW.normal(size=8)} for _ in range(1 + len(WEIGHTS[0]))
)


def delta(name: str, weights: list[float], **parameters: Any) -> Any:
    """The merged task vector, of a matrix and a vector."""
    more = SPARSE if "density" in merger_class(name).Each.model_fields else {}
    each = [{"weight": weight, **more} for weight in weights]
    found = merged(name, BASE, TAUS, parameters, each)
    return np.concatenate([(found[key] - np.float32(BASE[key])).ravel() for key in BASE])


def is_linear(name: str, **parameters: Any) -> bool:
    one, other = (delta(name, weights, **parameters) for weights in WEIGHTS)
    both = delta(name, [a + b for a, b in zip(*WEIGHTS, strict=True)], **parameters)
    return bool(np.allclose(one + other, both, atol=1e-5))


def test_who_says_so_is_linear_and_the_others_are_not() -> None:
    said = {name for name in method_names() if merger(name).linear}
    assert said == {"breadcrumbs", "dare_linear", "della_linear", "task_arithmetic"}
    assert all(is_linear(name) for name in said)
    for name in set(method_names()) - said:
        try:
            linear = is_linear(name)
        except (ColdmergeError, ValidationError):
            continue  # it takes no such weights, or needs statistics
        assert not linear, name


@pytest.mark.parametrize("name", ["breadcrumbs", "dare_linear", "della_linear", "task_arithmetic"])
def test_none_is_where_the_sum_of_weights_divides(name: str) -> None:
    assert not merger(name, normalize=True).linear
    assert not is_linear(name, normalize=True)


def test_optimizers_that_say_so_are_linear() -> None:
    tau, theta = np.linspace(-1, 1, 8), np.ones(8, np.float32)
    for name in outer_names():
        optimizer = outer(name, {})
        slots = {slot: optimizer.fresh(slot, theta) for slot in optimizer.remembers}
        ends = [optimizer.step(c * tau, theta, slots, 1)[0] for c in (0.0, 1.0, 2.0)]
        assert np.allclose(ends[2] - ends[1], ends[1] - ends[0]) == optimizer.linear, name
