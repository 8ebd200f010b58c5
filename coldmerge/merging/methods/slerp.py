"""Spherical interpolation between the base and one model."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block, View
from coldmerge.merging.combination import Unweighted, combined, wrong_count
from coldmerge.merging.gram import base_and_deltas, gram
from coldmerge.merging.merger import Merger, PerInput

STRAIGHT = 0.9995
"""Cosine above which mergekit replaces the arc by the chord."""


class Slerp(Merger):
    """Slerp (Shoemake, Animating rotation with quaternion curves, 1985): base to model by t.

    Each tensor is one vector. As in mergekit, nearly parallel ones are interpolated linearly.
    """

    name: ClassVar[str] = "slerp"
    Each: ClassVar[type[PerInput]] = Unweighted

    t: float = Field(default=0.5, description="Where between the base (0) and the model (1).")

    def check_inputs(self, count: int) -> None:
        """One model beside the base.

        Raises:
            ConfigError: there are more.
        """
        if count != 1:
            hint = "Name one of two models as the base; `karcher` takes any number."
            raise wrong_count(self.name, "one model beside the base", count, hint)

    def measure(self, view: View) -> Floats64:
        """The coefficients of the base and of τ in the merged delta."""
        self.check_inputs(len(view.inputs))
        ends = np.array([[1.0, 0.0], [1.0, 1.0]])
        inner = ends @ gram(view, base_and_deltas) @ ends.T
        start, end = arc(inner[0, 0], inner[1, 1], inner[0, 1], self.t, STRAIGHT)
        return np.array([start + end - 1, end])

    def merge(self, block: Block, facts: Floats64) -> Floats64:
        """The interpolation."""
        return combined(block, facts)


def arc(
    aa: npt.ArrayLike, bb: npt.ArrayLike, ab: npt.ArrayLike, t: float, straight: float
) -> tuple[Floats64, Floats64]:
    """The coefficients of a and b at `t` on the arc from one to the other.

    `aa`, `bb`, `ab` are inner products, of one pair of vectors or of many at once. Where the
    cosine is beyond ±`straight`, it is the chord instead. A zero vector is at right angles.
    """
    lengths = np.sqrt(np.asarray(aa, np.float64)) * np.sqrt(np.asarray(bb, np.float64))
    cosine = np.clip(ab / np.where(lengths > 0, lengths, 1.0), -1, 1)
    chord = np.abs(cosine) > straight
    angle = np.arccos(np.where(chord, 0.0, cosine))
    a = np.where(chord, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    return a, np.where(chord, t, np.sin(t * angle) / np.sin(angle))
