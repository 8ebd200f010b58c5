"""`ColdFusion`: coldmerge's merge methods, outer optimizers and gate as a strategy of Flower."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from coldmerge.core.errors import ColdmergeError, ConfigError
from coldmerge.core.validation import first_problem
from coldmerge.merging import Input, merger_class, uniform
from coldmerge.rounds.gate import Decision, Verdict, weigh
from coldmerge.rounds.policy import GatePolicy, MergePolicy
from coldmerge.rounds.statistics import statistics_for
from coldmerge_coordinator.merging.recipes import outer_of
from coldmerge_simulation.flower.arrays import Trained, Weights, merge_arrays
from coldmerge_simulation.flower.compat import (
    ArrayRecord,
    ConfigRecord,
    FedAvg,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    Result,
)

logger = logging.getLogger("flwr")

BASE, CANDIDATE = "base", "candidate"
Setting = str | int | float | bool


class ColdFusion(FedAvg):
    """Merges what clients trained by any merge method of coldmerge, and asks before it adopts.

    `merger` and `parameters` as in a plan or round policy, `outer` an outer optimizer with its
    `method`, `weights` "uniform" or "examples". With a `gate` (a GatePolicy or its keys) every
    sampled node evaluates the current and the merged arrays, and the merged ones are adopted
    only if `metric` (a share between 0 and 1) says so. Other words are those of FedAvg.

    Raises:
        ConfigError: no such method, or not with these parameters.
    """

    def __init__(
        self,
        merger: str = "mean",
        parameters: Mapping[str, Setting] | None = None,
        outer: Mapping[str, Setting] | None = None,
        gate: GatePolicy | Mapping[str, Any] | None = None,
        *,
        weights: str = "uniform",
        metric: str = "accuracy",
        threads: int | None = None,
        **fed_avg: Any,
    ) -> None:
        super().__init__(**fed_avg)
        given = {"method": merger, "parameters": dict(parameters or {}), "weights": weights}
        self._policy = _checked_merge({**given, "outer": dict(outer or {"method": "none"})})
        self._gate = _checked_gate(gate)
        self._metric, self._threads = metric, threads
        if self._gate is not None and not self.fraction_evaluate:
            raise ConfigError(
                "simulation.gate_without_evaluation",
                "A gate needs evaluations, and fraction_evaluate is 0.",
                hint="Let nodes evaluate, or leave out the gate.",
            )
        self._adopted: Weights | None = None
        self._candidate: Weights | None = None
        self.decisions: dict[int, Decision] = {}
        """What the gate said, by round."""

    def summary(self) -> None:
        """Log the settings."""
        logger.info("\t├──> ColdFusion settings:")
        logger.info("\t│\t├── Merge: %s", self._policy.model_dump_json())
        logger.info("\t│\t└── Gate: %s", self._gate and self._gate.model_dump_json())
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As every strategy; the result's arrays are the last that were adopted."""
        self._adopted, self._candidate = Weights.of(initial_arrays), None
        self.decisions.clear()

        def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            del arrays  # those of a candidate that was rejected, perhaps
            return evaluate_fn(number, self._now.record()) if evaluate_fn else None

        result = super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate
        )
        result.arrays = self._now.record()
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send what was adopted last, whatever the last candidate was."""
        if self._adopted is None:
            self._adopted = Weights.of(arrays)
        sent: Iterable[Message] = super().configure_train(
            server_round, self._now.record(), config, grid
        )
        return sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the clients' task vectors: the candidate, which without a gate is adopted.

        A reply that failed, or has other arrays, or NaN in them, is left out and logged. None:
        too few are left for the method.
        """
        base = self._now
        trained: list[Input] = []
        kept: list[RecordDict] = []
        for reply in replies:
            try:
                trained.append(self._read(base, reply))
                kept.append(reply.content)
            except ValueError as error:
                logger.warning("Node %d is left out: %s", reply.metadata.src_node_id, error)
        try:
            merged = merge_arrays(base, trained, self._policy, self._threads)
        except ColdmergeError as error:
            if error.code not in ("merge.inputs", "merge.input_count", "task_vector.not_finite"):
                raise
            logger.warning("Round %d merges nothing: %s", server_round, error)
            return None, None
        if self._gate is None:
            self._adopted = merged
        else:
            self._candidate = merged
        return merged.record(), self._metrics(kept)

    def _read(self, base: Weights, reply: Message) -> Input:
        """A reply as an input of the merge; ValueError says in words why it is none."""
        if reply.has_error():
            raise ValueError(reply.error.reason)
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"{len(records)} ArrayRecords, and not one")
        arrays = {name: array.numpy() for name, array in records[0].items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != {name: array.shape for name, array in base.arrays.items()}:
            raise ValueError("its arrays have other names or shapes than those it was sent")
        if any(not np.isfinite(arrays[name]).all() for name in base.masters):
            raise ValueError("its arrays hold NaN or infinity")
        weight = 1.0
        if self._policy.weights == "examples":
            metrics: Any = next(iter(reply.content.metric_records.values()), {})
            found = metrics.get(self.weighted_by_key)
            if not isinstance(found, int | float) or not 0 < found < float("inf"):
                raise ValueError(f"its {self.weighted_by_key} is {found}")
            weight = float(found)
        trained, node = Trained(base, arrays), reply.metadata.src_node_id
        return Input(f"{trained.digest()}-{node:020}", trained, weight, f"node {node}")

    def _metrics(self, contents: Sequence[RecordDict]) -> MetricRecord | None:
        known = [list(content.metric_records.values()) for content in contents]
        if any(len(found) != 1 or self.weighted_by_key not in found[0] for found in known):
            return None
        found: MetricRecord = self.train_metrics_aggr_fn(list(contents), self.weighted_by_key)
        return found

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let nodes evaluate; where a gate waits, the current arrays and the candidate's."""
        if self._adopted is None:
            self._adopted = Weights.of(arrays)
        now = self._now.record()
        asked = list(super().configure_evaluate(server_round, now, config, grid))
        if self._candidate is None:
            return asked
        records = {BASE: now, CANDIDATE: self._candidate.record()}
        return [
            Message(
                RecordDict({self.arrayrecord_key: record, self.configrecord_key: config}),
                message.metadata.dst_node_id,
                MessageType.EVALUATE,
                group_id=side,
            )
            for message in asked
            for side, record in records.items()
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the nodes' metrics; where a gate waits, those of what it decides for.

        The gate adds `gate-adopted` (0 or 1) and `gate-gain` in points.
        """
        replies = list(replies)
        if self._candidate is None or self._gate is None:
            found: MetricRecord | None = super().aggregate_evaluate(server_round, replies)
            return found
        sides: dict[str, dict[int, Message]] = {BASE: {}, CANDIDATE: {}}
        for reply in replies:
            if not reply.has_error() and reply.metadata.group_id in sides:
                sides[reply.metadata.group_id][reply.metadata.src_node_id] = reply
        gains = self._gains(sides)
        decision = _decided(gains, self._gate)
        self.decisions[server_round] = decision
        adopt = decision.verdict in (Verdict.PUBLISH, Verdict.PUBLISH_FLAGGED)
        logger.info("gate: %s: %s", decision.verdict.value, "; ".join(decision.reasons))
        if adopt:
            self._adopted = self._candidate
        self._candidate = None
        chosen = list(sides[CANDIDATE if adopt else BASE].values())
        metrics: MetricRecord = super().aggregate_evaluate(server_round, chosen)
        metrics = MetricRecord() if metrics is None else metrics
        metrics["gate-adopted"] = int(adopt)
        if gains:
            metrics["gate-gain"] = sum(gains.values()) / len(gains)
        return metrics

    def _gains(self, sides: Mapping[str, Mapping[int, Message]]) -> dict[str, float]:
        gains = {}
        for node in sorted(sides[BASE].keys() & sides[CANDIDATE].keys()):
            scores = [_score(sides[side][node], self._metric) for side in (BASE, CANDIDATE)]
            if scores[0] is None or scores[1] is None:
                logger.warning("Node %d reports no %s and is not counted", node, self._metric)
            else:
                gains[f"node {node}"] = 100 * (scores[1] - scores[0])
        return gains

    @property
    def _now(self) -> Weights:
        if self._adopted is None:
            raise ConfigError(
                "simulation.not_started",
                "ColdFusion was asked to merge before it knew what from.",
                hint="Call `start`, or `configure_train` before `aggregate_train`.",
            )
        return self._adopted


def _score(reply: Message, metric: str) -> float | None:
    for record in reply.content.metric_records.values():
        value = record.get(metric)
        if isinstance(value, int | float) and np.isfinite(value):
            return float(value)
    return None


def _decided(gains: Mapping[str, float], policy: GatePolicy) -> Decision:
    if len(gains) >= policy.min_evaluators:
        return weigh(gains, policy)
    reason = f"only {len(gains)} of at least {policy.min_evaluators} nodes evaluated both"
    return Decision(Verdict(policy.on_timeout), (reason,))


def _checked_merge(values: Mapping[str, Any]) -> MergePolicy:
    try:
        policy = MergePolicy.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "simulation.bad_strategy",
            f"ColdFusion cannot merge like this: {problem.key}: {problem.text}.",
            hint="docs/flower.md has an example.",
            key=problem.key,
        ) from error
    asked = statistics_for(policy)
    if asked:
        raise ConfigError(
            "simulation.needs_statistics",
            f"Merging by {policy.method} needs {sorted(asked)[0]} statistics, which Flower's "
            "clients do not send.",
            got=policy.method,
            hint="Choose a method that needs task vectors only: `coldmerge methods`.",
        )
    uniform(merger_class(policy.method), policy.parameters, [1.0])
    outer_of(policy)
    return policy


def _checked_gate(gate: GatePolicy | Mapping[str, Any] | None) -> GatePolicy | None:
    if gate is None or isinstance(gate, GatePolicy):
        return gate
    try:
        return GatePolicy.model_validate(dict(gate))
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "simulation.bad_gate",
            f"ColdFusion cannot judge like this: {problem.key}: {problem.text}.",
            hint="docs/rounds.md has the keys of a gate.",
            key=problem.key,
        ) from error
