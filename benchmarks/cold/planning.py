"""What will be run: everything that was asked for, or what of it fits into a budget.

What does not fit is left out in a declared order: other recipes, fine-tuning of releases,
baselines, seeds, rounds; last comes the cheap setting (frozen bottom layers, few examples), from
the full table down in the same order. Baselines that fit again once there are fewer seeds come
back. `benchmarks.cold.costs` says what a table costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.cold.outcome import Protocol
from coldmerge.core.errors import ConfigError

BASELINES = ("merges", "alone", "multitask", "oneshot")
"""In the order of leaving out. `merges` are other one-shot merges than the mean."""
PROTOCOLS: tuple[Protocol, ...] = ("lp100", "frozen", "ft100", "full")


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


Costs = Callable[[Parts], float]
"""Seconds from the start of the command to its end; infinite where a setting cannot be had."""


def choose(parts: Parts, costs: Costs, budget: float | None) -> tuple[Parts, list[str]]:
    """What fits into a budget of seconds, and what was left out.

    Raises:
        ConfigError: not even the smallest table fits.
    """
    if budget is None or costs(parts) <= budget:
        return parts, []
    settings = (True,) if parts.cheap else (False, True)
    least, smallest = math.inf, settings[0]
    for cheap in settings:
        turned = cheap and not parts.cheap
        left_out = ["the full setting (whole body, more examples)"] if turned else []
        start = replace(parts, cheap=cheap)
        options = [("", start), *start.smaller()]
        for word, left in options:
            left_out += [word] if word else []
            if costs(left) <= budget:
                return _filled(left, parts, left_out, costs, budget)
            if costs(left) < least:
                least, smallest = costs(left), cheap
    raise ConfigError(
        "cold.small_budget",
        "The budget is too small for any honest table.",
        expected=f"at least {math.ceil(least / 60)}m: the base and the mean, one seed, "
        f"{min(2, parts.rounds)} rounds{', in the cheap setting' if smallest else ''}",
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
