"""What a round screens its contributions for: frozen into the round with its policy."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScreeningPolicy(BaseModel):
    """Bounds on a contribution, in L2 norms of task vectors, and what happens beyond them.

    All bounds are multiples of the round's reference norm: see `coldmerge.screening.bounds`.
    `reference_norm` is used where the base release has no contributions to take it from.
    Cosines are only reported: honest task vectors of different tasks are nearly orthogonal,
    and a screen by cosine would throw them away.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    reference_norm: float | None = Field(default=None, gt=0)
    clip: float | None = Field(default=2.0, gt=0)
    smallest: float = Field(default=0.01, ge=0)
    largest: float = Field(default=10.0, gt=0)
    on_outlier: Literal["quarantine", "refuse", "accept"] = "quarantine"
    duplicates: Literal["quarantine", "warn"] = "quarantine"
    statistics: float | None = Field(default=10.0, ge=1)
    warn_above: float = Field(default=0.99, ge=-1, le=1)
    warn_below: float = Field(default=-0.2, ge=-1, le=1)

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if self.smallest >= self.largest:
            raise ValueError("smallest is not below largest")
        return self
