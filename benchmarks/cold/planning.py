"""What will be run: everything that was asked for, or what of it fits into a budget.

Costs are measured on this machine at the start: a training step, what a fine-tune costs
besides, and a text's features. What does not fit is left out in a declared order: other
recipes, fine-tuning of releases, baselines, seeds, rounds; last comes the cheap setting (frozen
bottom layers, few examples), from the full table down in the same order. Baselines that fit again
once there are fewer seeds come back.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cold.outcome import Protocol
from benchmarks.cold.recipes import ONESHOT
from benchmarks.cold.sets import SHOTS, Item, Split, TaskSet
from benchmarks.cold.tuning import EPOCHS
from coldmerge.core.errors import ConfigError

BASELINES = ("merges", "alone", "multitask", "oneshot")
"""In the order of leaving out. `merges` are other one-shot merges than the mean."""
PROTOCOLS: tuple[Protocol, ...] = ("lp100", "frozen", "ft100", "full")
WORKERS = 2
START_SECONDS, MERGE_SECONDS, PROBE_SECONDS = 20.0, 3.0, 0.1
SLACK = 1.15


@dataclass(frozen=True)
class Parts:
    """What a table consists of.

    Attributes:
        recipes: what is run beside the plain mean.
        baselines: some of `BASELINES`.
        protocols: how releases are measured.
        seeds: how many.
        rounds: of the plain mean.
        cheap: the cheap setting.

    """

    recipes: tuple[str, ...]
    baselines: tuple[str, ...]
    protocols: tuple[Protocol, ...]
    seeds: int
    rounds: int
    cheap: bool = False

    def smaller(self) -> Iterator[tuple[str, Parts]]:
        """What is left out in words, and what is left, one thing more each time."""
        left = self
        while left.recipes:
            left, gone = replace(left, recipes=left.recipes[:-1]), left.recipes[-1]
            yield f"recipe {gone}", left
        for protocol in ("full", "ft100"):
            if protocol in left.protocols:
                kept = tuple(one for one in left.protocols if one != protocol)
                left = replace(left, protocols=kept)
                yield f"protocol {protocol}", left
        for baseline in BASELINES:
            if baseline in left.baselines:
                kept_too = tuple(one for one in left.baselines if one != baseline)
                left = replace(left, baselines=kept_too)
                yield f"baseline {baseline}", left
        while left.seeds > 1:
            left = replace(left, seeds=left.seeds - 1)
            yield f"seed number {left.seeds + 1}", left
        while left.rounds > 2:
            left = replace(left, rounds=left.rounds - 1)
            yield f"round {left.rounds + 1}", left


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine, two processes working: of a step, a fine-tune besides, a text."""

    step: float
    fixed: float
    text: float


@dataclass(frozen=True)
class Sizes:
    """What costs depend on besides: numbers of examples."""

    counts: tuple[int, ...]
    measured: tuple[int, ...]
    examples: int
    epochs: float
    batch: int
    pool: int
    test: int
    draws: int
    tunes: int

    def steps(self, examples: int, epochs: float) -> int:
        """Optimizer steps."""
        return math.ceil(examples / self.batch) * math.ceil(epochs)


def cost(parts: Parts, speed: Speed, sizes: Sizes) -> float:
    """Seconds that a table takes, two processes working."""
    train = sum(sizes.steps(min(n, sizes.examples), sizes.epochs) for n in sizes.counts)
    one_round = train * speed.step + len(sizes.counts) * speed.fixed + MERGE_SECONDS
    simulation = START_SECONDS + parts.rounds * one_round
    probe = len(sizes.measured) * sizes.draws * PROBE_SECONDS + speed.text * sum(
        min(n, sizes.pool) + sizes.test for n in sizes.measured
    )
    total = probe + parts.seeds * (simulation + parts.rounds * probe)
    total += parts.seeds * len(parts.recipes) * (simulation + probe)
    if "multitask" in parts.baselines:
        total += parts.seeds * (simulation + probe)
    if "oneshot" in parts.baselines:
        total += parts.seeds * (simulation + probe)
    if "merges" in parts.baselines:
        total += parts.seeds * len(ONESHOT) * (probe + START_SECONDS)
    if "alone" in parts.baselines:
        total += parts.seeds * (probe + len(sizes.counts) * START_SECONDS / 2)
    for protocol, examples in (("ft100", SHOTS), ("full", sizes.pool)):
        if protocol in parts.protocols:
            draws = sizes.tunes if protocol == "ft100" else 1
            each = speed.fixed + sizes.test * speed.text
            each += sizes.steps(examples, EPOCHS[protocol]) * speed.step
            total += (1 + parts.seeds) * len(sizes.measured) * draws * each
    return total / WORKERS * SLACK


Costs = Callable[[Parts], float]


def choose(parts: Parts, costs: Costs, budget: float | None) -> tuple[Parts, list[str]]:
    """What fits into a budget of seconds, and what was left out.

    Raises:
        ConfigError: not even the smallest table fits.
    """
    if budget is None or costs(parts) <= budget:
        return parts, []
    least = math.inf
    for cheap in (True,) if parts.cheap else (False, True):
        turned = cheap and not parts.cheap
        left_out = ["the full setting (whole body, more examples)"] if turned else []
        start = replace(parts, cheap=cheap)
        options = [("", start), *start.smaller()]
        for word, left in options:
            left_out += [word] if word else []
            if costs(left) <= budget:
                return _filled(left, parts, left_out, costs, budget)
            least = min(least, costs(left))
    raise ConfigError(
        "cold.small_budget",
        "The budget is too small for any honest table.",
        expected=f"at least {math.ceil(least / 60)}m: the base and the mean, one seed, "
        "two rounds, in the cheap setting",
        got=f"{budget:g} s",
        hint=f"Everything that was asked for takes about {math.ceil(costs(parts) / 60)}m here.",
    )


def _filled(
    left: Parts, asked: Parts, left_out: list[str], costs: Costs, budget: float
) -> tuple[Parts, list[str]]:
    """Baselines that were left out and that still fit, now that there are fewer seeds."""
    for baseline in reversed(BASELINES):
        wanted = baseline in asked.baselines and baseline not in left.baselines
        # Merges, and what each has alone, are made of the one-shot's fine-tunes.
        if wanted and (baseline in ("oneshot", "multitask") or "oneshot" in left.baselines):
            more = replace(left, baselines=(baseline, *left.baselines))
            if costs(more) <= budget:
                left, gone = more, f"baseline {baseline}"
                left_out = [word for word in left_out if word != gone]
    return left, left_out


def sizes_of(split: Split, settings: dict[str, Any]) -> Sizes:
    """The numbers of a split under `settings`, as `federation` and `ruler` have them."""
    train, ruler = settings["train"], settings["ruler"]
    return Sizes(
        counts=tuple(held(task) for task in split.seen),
        measured=tuple(len(task.train) for task in (*split.seen, *split.unseen)),
        examples=train["max_examples"],
        epochs=train["epochs"],
        batch=train["batch_size"],
        pool=ruler["pool"],
        test=ruler["test"],
        draws=ruler["draws"],
        tunes=settings["tunes"],
    )


def held(task: TaskSet) -> int:
    """How many training examples a contributor has: without a validation part, a fifth less."""
    return len(task.train) if task.validation else len(task.train) - round(0.2 * len(task.train))


def calibrate(model: Path, train: dict[str, Any], items: Sequence[Item]) -> Speed:
    """Measure this machine with what contributors use."""
    from benchmarks.cold.measuring import Ruler, Subject
    from benchmarks.cold.tuning import tuned
    from coldmerge_client.training import models
    from coldmerge_client.training.config import TrainConfig
    from coldmerge_client.training.probe import Encoder

    config = TrainConfig.parse({**train, "data": "."})
    where = models.device(config)
    subject = Subject("base", 0, "calibration", model, (0,))

    def seconds(count: int) -> float:
        some = tuple(
            replace(item, label=place % 2) for place, item in enumerate(items[: count + 8])
        )
        task = TaskSet("calibration", Path(), ("0", "1"), some[:count], (), some[count:])
        ruler = Ruler(config.max_length, (), 8, count, 1, {**train, "epochs": 1}, shots=count)
        started = time.perf_counter()
        tuned(subject, ruler, task, "seen", "full", 0)
        return time.perf_counter() - started

    size = config.batch_size
    seconds(size)  # the first one loads libraries
    short, long = seconds(size), seconds(4 * size)
    step = max((long - short) / (3 * EPOCHS["full"]), 1e-4)
    encoder = Encoder(model, config.max_length, device=where, bf16=models.use_bf16(config, where))
    examples = encoder.tokenize([i.text for i in items], [i.pair for i in items])
    with tempfile.TemporaryDirectory() as cache:
        trunk = Path(cache) if len(config.freeze) > 1 else None
        encoder.pooled(examples[:8], config.freeze if trunk else (), trunk)
        if trunk:
            encoder.pooled(examples, config.freeze, trunk)
        started = time.perf_counter()
        encoder.pooled(examples, config.freeze if trunk else (), trunk)
        text = (time.perf_counter() - started) / len(examples)
    return Speed(step, max(short - EPOCHS["full"] * step, 0.1), text)


def words(parts: Parts) -> dict[str, Any]:
    """Parts as JSON."""
    return asdict(parts)
