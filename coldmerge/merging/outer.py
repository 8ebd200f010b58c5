"""Outer optimizers: how far merged task vectors move the weights, given the rounds before.

A merged task vector τ is read as the gradient g = −τ of a step that goes against it. What an
optimizer remembers from round to round are its slots, each an array like the weights. All
arithmetic is float64; whoever stores the results rounds them once to float32.

A package of a user's own registers an `Outer` by the entry point group `coldmerge.outers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.core.errors import ConfigError
from coldmerge.core.plugins import BrokenPluginError, plugin, plugin_names
from coldmerge.core.validation import first_problem

GROUP = "coldmerge.outers"

Slots = Mapping[str, Floats32]


class Outer(BaseModel, ABC):
    """An outer optimizer. Its fields are its parameters, `slots` what it remembers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    """Whether a step is linear in τ, but for what the slots add."""

    @property
    def remembers(self) -> tuple[str, ...]:
        """The slots of this one, where they depend on its parameters."""
        return self.slots

    @property
    def state_name(self) -> str:
        """Whose slots these are: another optimizer has no use for them."""
        return self.name

    def fresh(self, slot: str, theta: Floats32) -> Floats32:
        """What the slot holds before the first step: zeros, shape (n,)."""
        del slot
        return np.zeros(theta.size, np.float32)

    @abstractmethod
    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """One step over a block: what to add to `theta`, and the new slots, each (n,).

        `tau` is the merged task vector, `theta` the weights it is added to; `number` counts
        the steps from 1. A tensor that was never touched (τ and slots at `fresh`) gets zeros.
        """


class Plain(Outer):
    """No optimizer: θ ← θ + τ, as ColD Fusion (arXiv 2212.01378)."""

    name: ClassVar[str] = "none"
    linear: ClassVar[bool] = True

    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """τ itself."""
        del theta, slots, number
        return tau, {}


class Momentum(Outer):
    """Server momentum, FedAvgM (arXiv 1909.06335): v ← μv + g; θ ← θ − lr·v."""

    name: ClassVar[str] = "momentum"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    linear: ClassVar[bool] = True

    lr: float = Field(default=1.0, gt=0, description="Length of a step.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="μ: how much of v is kept.")

    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """As `torch.optim.SGD(momentum=μ)`."""
        del theta, number
        velocity = self._velocity(tau, slots)
        return velocity * -self.lr, {"momentum": velocity}

    def _velocity(self, tau: Floats64, slots: Slots) -> Floats64:
        velocity = np.multiply(slots["momentum"], self.momentum, dtype=np.float64)
        velocity -= tau
        return velocity


class Nesterov(Momentum):
    """DiLoCo (arXiv 2311.08105), Nesterov momentum: v ← μv + g; θ ← θ − lr·(μv + g)."""

    name: ClassVar[str] = "nesterov"

    lr: float = Field(default=0.7, gt=0, description="Length of a step.")

    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """As `torch.optim.SGD(momentum=μ, nesterov=True)`."""
        del theta, number
        velocity = self._velocity(tau, slots)
        ahead = velocity * self.momentum
        ahead -= tau
        ahead *= -self.lr
        return ahead, {"momentum": velocity}


class Adam(Outer):
    """Adam (arXiv 1412.6980) on the server, as FedAdam (arXiv 2003.00295) but bias-corrected.

    m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; θ ← θ − lr·m̂/(√v̂ + ε), m̂ = m/(1−β₁ᵗ) and
    v̂ = v/(1−β₂ᵗ). β₁, β₂ and ε default to those of FedAdam, which leaves out the correction.
    """

    name: ClassVar[str] = "adam"
    slots: ClassVar[tuple[str, ...]] = ("adam_m", "adam_v")

    lr: float = Field(default=1e-3, gt=0, description="Length of a step, of each weight.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="How much of m is kept.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="How much of v is kept.")
    eps: float = Field(default=1e-3, gt=0, description="ε: task vectors far below it move little.")

    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """As `torch.optim.Adam`."""
        del theta
        first = np.multiply(slots["adam_m"], self.beta1, dtype=np.float64)
        first -= (1 - self.beta1) * tau
        second = np.multiply(slots["adam_v"], self.beta2, dtype=np.float64)
        second += (1 - self.beta2) * np.square(tau)
        root = np.sqrt(second / (1 - self.beta2**number))
        root += self.eps
        moved = first / root
        moved *= -self.lr / (1 - self.beta1**number)
        return moved, {"adam_m": first, "adam_v": second}


class Ema(Outer):
    """Momentum weight interpolation (arXiv 2211.03186): θ ← mθ + (1−m)·fast, fast ← fast + τ.

    The slow weights θ are the release: contributors start from them, and evaluate them. The
    fast weights are base + Στ, all rounds taken in full; nobody downloads them. They start
    at θ. What a round adds arrives in θ over about 1/(1−m) rounds, and none of it is lost.
    """

    name: ClassVar[str] = "ema"
    slots: ClassVar[tuple[str, ...]] = ("fast",)
    linear: ClassVar[bool] = True

    momentum: float = Field(default=0.9, ge=0, lt=1, description="m: how much of θ is kept.")

    def fresh(self, slot: str, theta: Floats32) -> Floats32:
        """The weights themselves."""
        del slot
        return theta

    def step(
        self, tau: Floats64, theta: Floats32, slots: Slots, number: int
    ) -> tuple[Floats64, dict[str, Floats64]]:
        """As `torch.lerp(fast, θ, m)`."""
        del number
        fast = np.add(slots["fast"], tau, dtype=np.float64)
        moved: Floats64 = np.subtract(fast, theta, dtype=np.float64)
        moved *= 1 - self.momentum
        return moved, {"fast": fast}


_ALL: dict[str, type[Outer]] = {kind.name: kind for kind in (Plain, Momentum, Nesterov, Adam, Ema)}


def outer_names() -> list[str]:
    """Every outer optimizer there is, sorted."""
    return sorted({*_ALL, *plugin_names(GROUP)})


def outer(name: str, parameters: Mapping[str, Any]) -> Outer:
    """The outer optimizer called `name`.

    Raises:
        ConfigError: there is none, or a parameter is unknown or out of range.
    """
    kind = _ALL.get(name) or _plugin(name)
    if kind is None:
        raise ConfigError(
            "outer.unknown_method",
            f"There is no outer optimizer {name}.",
            expected=" | ".join(outer_names()),
            got=name,
            hint="Correct `merge.outer.method` in the round policy.",
        )
    try:
        return kind.model_validate(dict(parameters))
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "outer.bad_parameter",
            f"The outer optimizer {name} cannot take its parameters: {problem.key}: "
            f"{problem.text}.",
            expected=f"parameters of {name}: {', '.join(kind.model_fields) or 'none'}",
            got=", ".join(f"{key}={value}" for key, value in parameters.items()) or "none",
            hint="docs/rounds.md lists them with their ranges and defaults.",
            parameter=problem.key,
        ) from error


def _plugin(name: str) -> type[Outer] | None:
    def fault(item: Any) -> str:
        return "" if issubclass(item, Outer) and item.name == name else "not an Outer of that name"

    try:
        found: type[Outer] | None = plugin(GROUP, name, fault)
    except BrokenPluginError as error:
        raise ConfigError(
            "outer.broken_plugin",
            f"The outer optimizer {name} of another package cannot be used.",
            expected=f"a subclass of coldmerge.merging.outer.Outer at {error.target}",
            got=error.got,
            hint="Ask the package's author, or uninstall it.",
        ) from error
    return found
