"""The outer optimizer `flower`: one of Flower's server optimizers, from release to release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.merging.outer import Outer, Slots
from coldmerge_simulation.flower.rules import SLOTS, Found, aggregate, reply, stepping_strategy

ARRAY = "w"
"""What a block is called among Flower's arrays."""


class FlowerOuter(Outer):
    """One of Flower's server optimizers, whose state the coordinator keeps.

    The strategy's current arrays are zeros and its one client sends the merged task vector, so
    that what it returns is the step. That is its own arithmetic, in float64.
    """

    name: ClassVar[str] = "flower"

    strategy: str = Field(default="FedAdam", description="FedAdam, FedYogi, FedAdagrad or FedAvgM.")
    eta: float | None = Field(default=None, gt=0, description="Length of a step. Not FedAvgM.")
    beta_1: float | None = Field(default=None, ge=0, lt=1, description="How much of m is kept.")
    beta_2: float | None = Field(default=None, ge=0, lt=1, description="How much of v is kept.")
    tau: float | None = Field(default=None, gt=0, description="What is added to √v.")
    server_learning_rate: float | None = Field(default=None, gt=0, description="FedAvgM's step.")
    server_momentum: float | None = Field(default=None, ge=0, lt=1, description="FedAvgM's μ.")

    @model_validator(mode="before")
    @classmethod
    def _every_parameter(cls, values: Any) -> Any:
        """Give the strategy's own defaults a place among the parameters.

        Raises:
            ConfigError: Flower is missing, or has no such optimizer, or not with these.
        """
        given = dict(values)
        found = stepping_strategy(str(given.pop("strategy", "FedAdam")))
        own = found.checked({word: value for word, value in given.items() if value is not None})
        return {**own, "strategy": found.name}

    @property
    def found(self) -> Found:
        """The strategy."""
        return stepping_strategy(self.strategy)

    @property
    def own(self) -> Mapping[str, Any]:
        """The strategy's parameters."""
        return {word: getattr(self, word) for word in self.found.defaults}

    @property
    def remembers(self) -> tuple[str, ...]:
        """What the strategy keeps; FedAvgM without momentum keeps nothing."""
        return () if self.server_momentum == 0 else SLOTS[self.strategy]

    @property
    def state_name(self) -> str:
        """Another strategy has no use for these slots."""
        return f"{self.name}.{self.strategy}"

    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """As `aggregate_train` of the strategy in round `number`."""
        del theta
        made = self.found.made(self.own)
        held = {slot: values.astype(np.float64) for slot, values in slots.items()}
        _put(made, self.strategy, held, np.zeros(tau.size))
        replies = [reply(0, {ARRAY: tau}, 1.0)]
        moved = aggregate(self.found, made, replies, {ARRAY: tau.shape}, number)[ARRAY]
        return moved.astype(np.float64), _taken(made, self.remembers)


def _put(made: Any, strategy: str, held: Mapping[str, Floats64], zeros: Floats64) -> None:
    if strategy != "FedAvgM":
        made.current_arrays = {ARRAY: zeros}
        for slot, values in held.items():
            setattr(made, f"{slot}_t", {ARRAY: values})
        return
    from coldmerge_simulation.flower.compat import Array, ArrayRecord

    made.current_arrays = ArrayRecord({ARRAY: Array(zeros)})
    made.momentum_vector = [held["momentum"]] if held else None


def _taken(made: Any, slots: tuple[str, ...]) -> dict[str, Floats64]:
    if slots == ("momentum",):
        return {"momentum": made.momentum_vector[0]}
    return {slot: getattr(made, f"{slot}_t")[ARRAY] for slot in slots}
