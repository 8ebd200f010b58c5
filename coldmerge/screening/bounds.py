"""The norm band and the clip: how far one contribution may move a merge.

With the merge `mean` of N contributions nobody moves the result by more than
`clip * reference / N`, whatever it sends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median_low

from coldmerge.screening.policy import ScreeningPolicy


def reference_norm(norms: Iterable[float]) -> float | None:
    """The median of the norms above zero; of an even number the lower one in the middle.

    Below half of them, contributors who lie cannot move it beyond what honest ones sent.
    None: there is no norm above zero.
    """
    counted = [norm for norm in norms if norm > 0]
    return median_low(counted) if counted else None


def clip_factor(norm: float, reference: float | None, clip: float | None) -> float:
    """What a task vector of `norm` is multiplied by: exactly 1.0 where it is within bounds."""
    if clip is None or reference is None or norm <= clip * reference:
        return 1.0
    return clip * reference / norm


def clip_factors(
    norms: Mapping[str, float], reference: float | None, clip: float | None
) -> Factors:
    """`clip_factor` of each norm, by the same keys in order."""
    return {key: clip_factor(norms[key], reference, clip) for key in sorted(norms)}


Factors = dict[str, float]
"""Manifest digest → what its task vector is multiplied by in the merge."""


def outside(norm: float, reference: float | None, policy: ScreeningPolicy) -> str | None:
    """Why a norm is outside the band, as a sentence; None: it is not, or nothing is known.

    Without a reference there is no band: the first round of a model is clipped when it seals.
    """
    if reference is None or policy.on_outlier == "accept":
        return None
    ratio = norm / reference
    if policy.smallest <= ratio <= policy.largest and math.isfinite(ratio):
        return None
    return (
        f"its norm {norm:.4g} is {ratio:.4g} times the round's reference norm {reference:.4g}, "
        f"outside {policy.smallest:g} to {policy.largest:g}"
    )
