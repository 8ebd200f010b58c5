"""What a table costs on this machine, in seconds: counted from settings, timed at the start.

A training step, what a fine-tune costs besides, a text's features and the start of a process are
measured; how often each of them comes is counted from the very settings that simulations run with.
"""

from __future__ import annotations

import heapq
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cold.planning import Parts
from benchmarks.cold.recipes import COMMON, ONESHOT, Federation, policies
from benchmarks.cold.sets import SHOTS, Item, Split, TaskSet, held
from coldmerge_client.training.config import EvaluateConfig
from coldmerge_simulation.config import merged
from coldmerge_simulation.data import names

EPOCHS: dict[str, float] = {"ft100": 10, "full": 3}
"""Passes of fine-tuning over 100 examples, and over the whole pool."""
WORKERS = 2
BEGIN_SECONDS, MERGE_SECONDS, JUDGE_SECONDS, PROBE_SECONDS = 5.0, 3.0, 1.0, 0.1
SLACK = 1.15


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine, two processes working.

    Attributes:
        step: of a training step.
        fixed: what a fine-tune takes besides its steps.
        text: of a text's features.
        first: the same the first time, before what frozen layers compute is kept.
        start: until a process of the product begins to work.

    """

    step: float
    fixed: float
    text: float
    first: float
    start: float


@dataclass(frozen=True)
class Sizes:
    """What costs depend on besides: numbers of examples.

    Attributes:
        counts: training examples of each seen set, as its contributor holds them.
        judged: texts with which that contributor judges a candidate.
        measured: training examples of each set that is measured.
        batch: examples of a step.
        pool: at most so many training examples are probed with.
        test: at most so many test examples are measured on.
        draws: of probes.
        tunes: draws of 100-shot fine-tuning.

    """

    counts: tuple[int, ...]
    judged: tuple[int, ...]
    measured: tuple[int, ...]
    batch: int
    pool: int
    test: int
    draws: int
    tunes: int


def sizes_of(split: Split, settings: Mapping[str, Any]) -> Sizes:
    """The numbers of a split under a plan's settings."""
    train, ruler = settings["train"], settings["ruler"]
    limit = EvaluateConfig.model_validate(train.get("evaluate", {})).max_examples
    validation = [len(task.train) - held(task) or len(task.validation) for task in split.seen]
    return Sizes(
        counts=tuple(held(task) for task in split.seen),
        judged=tuple(
            min(limit, held(task)) + min(limit, count)
            for task, count in zip(split.seen, validation, strict=True)
        ),
        measured=tuple(len(task.train) for task in (*split.seen, *split.unseen)),
        batch=train["batch_size"],
        pool=ruler["pool"],
        test=ruler["test"],
        draws=ruler["draws"],
        tunes=settings["tunes"],
    )


def cost(parts: Parts, speed: Speed, sizes: Sizes, federation: Federation) -> float:
    """Seconds that a table takes, two processes working."""
    runs = list(_simulations(parts, speed, sizes, federation))
    texts = sum(min(n, sizes.pool) + sizes.test for n in sizes.measured)
    probe = len(sizes.measured) * sizes.draws * PROBE_SECONDS + texts * speed.text
    merges = len(ONESHOT) if "merges" in parts.baselines else 0
    alone = len(sizes.counts) if "alone" in parts.baselines else 0
    releases = parts.rounds + len(runs) // parts.seeds - 1 + merges + bool(alone)
    others = (
        probe
        + texts * (speed.first - speed.text)
        + parts.seeds * (releases * probe + (merges + alone) * speed.start)
    )
    for protocol, examples in (("ft100", SHOTS), ("full", sizes.pool)):
        if protocol in parts.protocols:
            draws = sizes.tunes if protocol == "ft100" else 1
            each = speed.fixed + sizes.test * speed.text
            each += math.ceil(examples / sizes.batch) * math.ceil(EPOCHS[protocol]) * speed.step
            best = protocol == "ft100" and bool(policies(parts.recipes))
            tuned = 1 + parts.seeds * (1 + best)
            others += tuned * len(sizes.measured) * draws * each
    # A simulation is one process: with few of them a worker waits, however little work is left.
    last = parts.rounds * probe / WORKERS
    return max((sum(runs) + others) / WORKERS, _dealt(runs) + last) * SLACK


def _simulations(
    parts: Parts, speed: Speed, sizes: Sizes, federation: Federation
) -> Iterator[float]:
    """Seconds of each simulation, in the order of the work."""
    wanted = [(federation.simulation(COMMON, 0), sizes.counts)]
    if "oneshot" in parts.baselines:
        wanted.append((federation.oneshot(0), sizes.counts))
    if "multitask" in parts.baselines:
        settings = federation.multitask(Path("pooled"), 0)
        most = federation.at_once()["max_examples"]
        wanted.append((settings, (sum(min(most, count) for count in sizes.counts),)))
    wanted += [(federation.simulation(name, 0), sizes.counts) for name in parts.recipes]
    for settings, counts in wanted:
        for _ in range(parts.seeds):
            yield simulated(settings, counts, sizes, speed)


def simulated(
    settings: Mapping[str, Any], counts: Sequence[int], sizes: Sizes, speed: Speed
) -> float:
    """Seconds of one simulation among contributors who hold `counts` training examples."""
    count, steps = settings["contributors"], 0
    holders = Counter(place % len(counts) for place in range(count))
    for place, name in enumerate(names(count)):
        train = merged(settings["train"], settings.get("overrides", {}).get(name, {}))
        mine = counts[place % len(counts)] // holders[place % len(counts)]
        used = min(mine, train.get("max_examples") or mine)
        passes = 2 if train.get("sam") else 1
        steps += passes * math.ceil(math.ceil(used / train["batch_size"]) * train["epochs"])
    share = settings.get("participation", {}).get("share", 1.0)
    one_round = share * (steps * speed.step + count * speed.fixed) + MERGE_SECONDS
    learned = settings["round"]["merge"].get("coefficients")
    if learned:
        judging = sum(sizes.judged) * speed.text + count * JUDGE_SECONDS
        one_round += learned["probes"] * (judging + MERGE_SECONDS)
    return float(speed.start + BEGIN_SECONDS + settings["rounds"] * one_round)


def _dealt(seconds: Sequence[float]) -> float:
    """When the last of some jobs ends, each given to the first worker that is free."""
    free = [0.0] * WORKERS
    for one in seconds:
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


def calibrate(model: Path, train: dict[str, Any], items: Sequence[Item]) -> Speed:
    """Measure this machine with what contributors use."""
    from benchmarks.cold.measuring import Ruler, Subject
    from benchmarks.cold.simulations import starting
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

        def each() -> float:
            started = time.perf_counter()
            encoder.pooled(examples, config.freeze if trunk else (), trunk)
            return (time.perf_counter() - started) / len(examples)

        encoder.pooled(examples[:8])
        first, text = each(), each()
    return Speed(step, max(short - EPOCHS["full"] * step, 0.1), text, first, starting())
