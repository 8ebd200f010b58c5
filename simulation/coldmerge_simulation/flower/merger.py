"""The merge method `flower`: a round of a coordinator merges by one of Flower's strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from coldmerge.core.dtypes import Floats32, size
from coldmerge.core.errors import ConfigError
from coldmerge.merging import Block, Merger, PerInput, Scope, View
from coldmerge.merging.combination import wrong_count
from coldmerge.merging.merger import Share, Values
from coldmerge_simulation.flower.rules import Found, aggregate, merging_strategy, reply

COPIES = 7
"""How often an input is in memory while a strategy compares whole models: 3.1 times for Krum,
6.5 for Bulyan on one tensor, measured."""

GIB = 2**30


class Flower(Merger):
    """One of Flower's strategies (flwr.serverapp.strategy), given the task vectors as arrays.

    Mean, median and trimmed mean are streamed in blocks; the others get whole models and hold
    all inputs in memory at once. An input's weight is its number of examples. docs/flower.md
    says what each strategy means for task vectors.
    """

    model_config = ConfigDict(extra="allow")

    name: ClassVar[str] = "flower"
    block: ClassVar[int] = 2**18
    Each: ClassVar[type[PerInput]] = Share
    caution: ClassVar[str] = (
        "Krum, MultiKrum, Bulyan and strategies of your own hold all contributions of a round "
        "in memory at once; coldmerge's own krum does not."
    )

    strategy: str = Field(
        default="FedAvg", description="Which one, such as Krum or multi_krum; see docs/flower.md."
    )
    num_malicious_nodes: int | None = Field(
        default=None, ge=0, description="Krum, MultiKrum, Bulyan: how many inputs may be hostile."
    )
    num_nodes_to_select: int | None = Field(
        default=None, ge=1, description="MultiKrum: how many inputs are averaged."
    )
    beta: float | None = Field(
        default=None, ge=0, lt=0.5, description="FedTrimmedAvg: share cut off at each end."
    )
    max_memory: float = Field(
        default=4.0, gt=0, description="GiB that a strategy on whole models may take."
    )

    @model_validator(mode="before")
    @classmethod
    def _every_parameter(cls, values: Any) -> Any:
        """Give the strategy's own defaults a place among the parameters.

        Raises:
            ConfigError: Flower is missing, or has no such strategy, or not with these.
        """
        given = dict(values)
        ours = {word: given.pop(word) for word in ("strategy", "max_memory") if word in given}
        found = merging_strategy(str(ours.get("strategy", "FedAvg")))
        own = found.checked({word: value for word, value in given.items() if value is not None})
        return {**ours, **own, "strategy": found.name}

    @property
    def found(self) -> Found:
        """The strategy."""
        return merging_strategy(self.strategy)

    @property
    def own(self) -> Mapping[str, Any]:
        """The strategy's parameters."""
        values = {**self.__dict__, **(self.__pydantic_extra__ or {})}
        return {word: values[word] for word in self.found.defaults}

    @property
    def scope(self) -> Scope:
        """The whole model, for strategies that compare whole models."""
        if self.strategy == "FedAvg":  # the default: says so without looking into Flower
            return Scope.TENSOR
        return Scope.GLOBAL if self.found.rule.whole else Scope.TENSOR

    def check_inputs(self, count: int) -> None:
        """As many as the strategy needs to keep its promise.

        Raises:
            ConfigError: there are fewer.
        """
        self.found.made(self.own)
        least = self.found.rule.least(self.own)
        if count < least:
            raise wrong_count(
                f"flower ({self.strategy})",
                f"at least {least} inputs with these parameters",
                count,
                "Lower num_malicious_nodes or num_nodes_to_select, or wait for more contributions.",
            )

    def check_size(self, elements: int, count: int) -> None:
        """That `count` inputs of `elements` numbers fit into `max_memory`.

        Raises:
            ConfigError: a strategy on whole models would take more.
        """
        if not self.found.rule.whole:
            return
        needed = elements * count * COPIES * 4 / GIB
        if needed > self.max_memory:
            raise ConfigError(
                "flower.memory",
                f"Flower's {self.strategy} holds every contribution in memory at once, and these "
                "are too large for that.",
                expected=f"at most max_memory = {self.max_memory:g} GiB",
                got=f"about {needed:.1f} GiB: {count} inputs of {elements} numbers",
                hint="Merge by coldmerge's own krum, which reads blocks, or raise `max_memory`.",
            )

    def measure(self, view: View) -> dict[str, Values] | None:
        """The merged model, of a strategy that compares whole ones."""
        if not self.found.rule.whole:
            return None
        self.check_size(view.size, len(view.inputs))
        shapes: dict[str, tuple[int, ...]] = {}
        replies = []
        for i in view.inputs:
            arrays: dict[str, Floats32] = {}
            for block in view.blocks():
                shapes[block.name] = block.tensor_shape
                flat = arrays.setdefault(block.name, np.empty(size(block.tensor_shape), np.float32))
                flat[block.start : block.stop] = block.row(i)
            shaped = {name: flat.reshape(shapes[name]) for name, flat in arrays.items()}
            replies.append(reply(i, shaped, view.each[i].weight))
        merged = aggregate(self.found, self.found.made(self.own), replies, shapes)
        return {name: values.reshape(-1) for name, values in merged.items()}

    def merge(self, block: Block, facts: dict[str, Values] | None) -> Values:
        """The strategy's result."""
        if facts is not None:
            return facts[block.name][block.start : block.stop]
        rows = block.stack()
        if block.size == 1 < size(block.tensor_shape):  # numpy adds one column in another order
            rows = np.repeat(rows, 2, axis=1)
        replies = [
            reply(i, {block.name: row}, each.weight)
            for i, (row, each) in enumerate(zip(rows, block.each, strict=True))
        ]
        made = self.found.made(self.own)
        merged = aggregate(self.found, made, replies, {block.name: rows.shape[1:]})
        return merged[block.name][: block.size]
