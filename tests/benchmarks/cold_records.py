"""Records as a run of benchmarks.cold would write them, with effects that are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks.cold.outcome import Group, Outcome, Plan, Protocol, Run, Score, pack

SEEN = ("emotion", "entailment", "grammar", "intent", "law", "reviews", "spam", "topic")
UNSEEN = ("arts", "clicks", "domains", "films", "news", "poems", "tweets", "yelp")
STEPS = 500
POLICIES: dict[str, dict[str, float]] = {
    "atm": {"seen": 11, "unseen": 2},
    "ema": {"seen": 7, "unseen": 1},
    "ties": {"seen": 6, "unseen": 0.2},
    "sam": {"seen": 14, "unseen": 3},
}
AT_ONCE: dict[str, dict[str, float]] = {
    "multitask": {"seen": 12, "unseen": 1.5},
    "oneshot-mean": {"seen": 5, "unseen": 0.8},
    "oneshot-ties": {"seen": 4, "unseen": 0.5},
}
ONE_THING: dict[str, float] = {
    "cohort-2": 9.8,
    "cohort-8": 10,
    "examples-100": 6,
    "examples-500": 10,
    "lora": 5,
    "coefficients-uniform": 3,
    "coefficients-learned": 6,
    "coefficients-layerwise": 5,
}


def plan(seen: Sequence[str] = SEEN, unseen: Sequence[str] = UNSEEN, **more: object) -> Plan:
    """A plan for these sets."""
    some = Plan(
        options={"data": {"emotion": "0a"}, "seeds": 2, "budget": None, "protocols": ["lp100"]},
        seen=tuple(seen),
        unseen=tuple(unseen),
        settings={"train": {"lr": 1e-4, "epochs": 2, "freeze": []}, "tunes": 3},
        model={"name": "a-small-encoder", "digest": "0" * 64},
        versions={"python": "3.11"},
        machine={"cpu": "a processor", "cores": 2, "gpu": None},
    )
    return replace(some, **more)  # type: ignore[arg-type]


class Writer:
    """Scores whose releases are better than the base by so many points, up to chance."""

    def __init__(self, folder: Path, the_plan: Plan | None = None, n: int = 200) -> None:
        self.outcome = Outcome(folder)
        self.plan = self.outcome.claim(the_plan or plan())
        self.n = n

    def measure(
        self,
        variant: str,
        release: int,
        gains: Mapping[str, float],
        *,
        seeds: Iterable[int] = (0, 1),
        draws: int = 2,
        protocol: str = "lp100",
        tasks: Sequence[str] | None = None,
        spread: float = 3.0,
        steps: int | None = None,
    ) -> None:
        """Note a release's measurements; `gains` are by group, sets differ by `spread`."""
        seen, unseen = list(self.plan.seen), list(self.plan.unseen)
        for seed in seeds:
            lines: list[Run | Score] = [
                Run(
                    variant=variant,
                    seed=seed,
                    release=release,
                    digest=f"{variant}{release}",
                    bytes=90_000_000 * release,
                    train_seconds=100.0 * release,
                    steps=STEPS * release if steps is None else steps,
                    examples=8_000 * release,
                )
            ]
            for place, task in enumerate([*seen, *unseen]):
                group = "seen" if task in seen else "unseen"
                if group not in gains or (tasks is not None and task not in tasks):
                    continue
                own = spread * ((place % 5) - 2) / 2 if release else 0.0
                for draw in range(draws):
                    lines.append(
                        self._score(
                            (variant, seed, release, task, group, protocol, draw),
                            60 + gains[group] + own,
                            place,
                        )
                    )
            self.outcome.note(*lines)

    def _score(
        self, key: tuple[str, int, int, str, str, str, int], accuracy: float, place: int
    ) -> Score:
        variant, seed, release, task, group, protocol, draw = key
        # An example's difficulty is its own; runs and draws add a little to it.
        hard = np.random.default_rng([7, place]).uniform(0, 100, self.n)
        code = [sum(map(ord, variant)), seed, release, place, draw, len(protocol)]
        noise = np.random.default_rng(code).normal(0, 8, self.n)
        hits = hard + noise < accuracy
        return Score(
            variant,
            seed,
            release,
            task,
            cast(Group, group),
            cast(Protocol, protocol),
            draw,
            float(hits.mean()),
            float(hits.mean()),
            pack(hits),
            self.n,
        )


def whole(folder: Path) -> Path:
    """A main study with policies, sizes, LoRA and coefficients."""
    writer = Writer(folder, plan(left_out=("seed number 3",), dropped={"tiny": "one class only"}))
    writer.measure("base", 0, {"seen": 0, "unseen": 0})
    curve = [(4, 1.3), (6, 2.2), (8, 2.0), (9, 1.8), (10, 1.4)]
    for release, (seen, unseen) in enumerate(curve, 1):
        writer.measure("mean", release, {"seen": seen, "unseen": unseen})
    for name, gains in AT_ONCE.items():
        writer.measure(name, 1, gains, steps=5 * STEPS)
    writer.measure("alone", 1, {"seen": 11}, steps=5 * STEPS)
    for name, gains in POLICIES.items():
        writer.measure(name, 5, gains)
    for name, gain in ONE_THING.items():
        writer.measure(name, 5, {"seen": gain, "unseen": 1})
    for protocol in ("ft100", "full"):
        writer.measure("base", 0, {"seen": 0, "unseen": 0}, protocol=protocol, draws=3)
        writer.measure("mean", 5, {"seen": 2, "unseen": 1.5}, protocol=protocol, draws=3)
    return folder
