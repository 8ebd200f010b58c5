"""Slopes of a round's objective along its task vectors: what is asked for, and what it comes to.

In AdaMerging (arXiv 2310.02575) the slope of a coefficient c of τ is <dL/dθ, τ>: a number that
whoever has the data can report. Nobody is sent τ for it. A candidate is linear in its
coefficients, so that the first candidates of a search, the start and a step from it along each
atom's coefficients, differ by the atoms' task vectors; everybody pulls them anyway. Evaluators
report inner products of their gradient with these differences, in all layers or in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum, hypot
from statistics import median
from typing import Literal

from coldmerge.core.documents import MOST_SLOPES, Evaluation
from coldmerge.rounds.coefficients import FEWEST_TO_CLIP, Search
from coldmerge.rounds.descent import Point
from coldmerge.rounds.policy import CoefficientsPolicy

NUMBER_BYTES, NAME_BYTES = 18, 6
"""What a slope, and what is around a layer's name, takes of an evaluation."""

ROOM = 2**15 + 2**14
"""Bytes of an evaluation that slopes may take, of 64 KiB."""


def rounded(slope: float) -> float:
    """To nine digits, as slopes are reported and kept."""
    return float(f"{slope:.8e}")


def fit(search: Search) -> bool:
    """Whether an evaluation has room for a slope of each coefficient."""
    count = len(search.point)
    names = sum(len(group) + NAME_BYTES for group in search.groups)
    return count <= MOST_SLOPES and NUMBER_BYTES * count + names <= ROOM


def directions(search: Search, policy: CoefficientsPolicy) -> tuple[str, ...]:
    """Content digests of the candidates that slopes are told along, of those measured so far.

    The start is the first of them, then come the atoms. Empty: the method asks for no slopes.
    """
    if policy.method != "gradient":
        return ()
    return tuple(probe.candidate for probe in search.probes[: 1 + len(search.atoms)])


def asked(search: Search, policy: CoefficientsPolicy) -> Literal["", "task", "layer"]:
    """Whether the probe at hand asks for slopes, and of what; "": it does not."""
    if policy.method != "gradient" or search.done or len(search.probes) <= len(search.atoms):
        return ""
    return "task" if search.groups == ("",) else "layer"


def reported(search: Search, evaluation: Evaluation) -> Point | None:
    """The slopes that an evaluation reports, in the order of the search's point.

    A layer that it leaves out has none, for nothing that is merged is in it. None: it reports
    none, or not one for each atom, or of a layer that the search does not know.
    """
    told = evaluation.slopes
    count = len(search.atoms)
    if not told or not told.keys() <= set(search.groups):
        return None
    if any(len(each) != count for each in told.values()):
        return None
    none = (0.0,) * count
    return tuple(told.get(group, none)[atom] for atom in range(count) for group in search.groups)


def combined(
    search: Search, policy: CoefficientsPolicy, reports: Mapping[str, Point]
) -> Point | None:
    """The slope of each coefficient, of what evaluators reported: the mean of them.

    From three evaluators on, one's slopes count for at most `clip` times the norm of the median
    evaluator's: a liar, while those are a minority, moves the mean of n by no more than that
    over n. None: fewer than `min_evaluators` reported some.
    """
    if not reports or len(reports) < policy.min_evaluators:
        return None
    norms = {name: hypot(*told) for name, told in sorted(reports.items())}
    bound = policy.clip * median(norms.values()) if len(norms) >= FEWEST_TO_CLIP else None
    factors = {
        name: 1.0 if bound is None or norm <= bound else bound / norm
        for name, norm in norms.items()
    }
    lengths = _lengths(search)
    return tuple(
        rounded(fsum(factors[name] * reports[name][at] for name in norms) / len(norms) / length)
        for at, length in enumerate(lengths)
    )


def _lengths(search: Search) -> list[float]:
    """How far the direction of each coefficient goes: what the first candidates differ by."""
    width = len(search.groups)
    start = search.probes[0].point
    return [search.probes[1 + at // width].point[at] - start[at] for at in range(len(search.point))]
