"""Recipes: overrides of a simulation's configuration, and the studies that they make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldmerge.core import yaml_file
from coldmerge.core.errors import ConfigError
from coldmerge_simulation.config import merged
from coldmerge_simulation.data import names

FOLDER = Path(__file__).with_name("recipes")
COMMON = "mean"
"""The recipe that all others override."""

STUDIES = ("main", "mean", "policies", "cohort", "examples", "lora", "coefficients")
"""What can be run beside the plain mean: `main` has baselines, `mean` nothing, others recipes."""
_SIZED = ("cohort", "examples", "lora", "coefficients")
_SETTINGS = (COMMON, "cheap")

ONESHOT: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "task_arithmetic": {"weight": 0.3},
    "iso_c": {},
    "breadcrumbs": {"weight": 0.3},
}
"""One-shot merges beside the mean, with parameters of the papers' order."""


def study(name: str) -> tuple[str, ...]:
    """The recipes of a study, by name: those called after it, for `policies` those of no other."""
    there = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    by_study = {one: [stem for stem in there if stem.split("-")[0] == one] for one in _SIZED}
    others = {stem for stems in by_study.values() for stem in stems} | set(_SETTINGS)
    by_study["policies"] = [stem for stem in there if stem not in others]
    return tuple(by_study.get(name, ()))


def policies(names: Sequence[str]) -> list[str]:
    """Those of some recipes that change how rounds go, and not what is trained or by whom."""
    return [name for name in names if name.split("-")[0] not in _SIZED]


def load(name: str) -> dict[str, Any]:
    """A recipe's overrides.

    Raises:
        ConfigError: there is no such recipe.
    """
    try:
        return dict(yaml_file.load(FOLDER / f"{name}.yaml") or {})
    except FileNotFoundError as error:
        raise ConfigError(
            "cold.unknown_recipe",
            f"There is no recipe {name}.",
            expected=", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml"))),
            got=name,
            hint="Recipes are files of benchmarks/cold/recipes.",
        ) from error


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with `org-1` in a recipe as it is called among so many contributors (`org-01`)."""
    known = {int(name.rpartition("-")[2]): name for name in names(settings["contributors"])}

    def called(name: str) -> str:
        return known.get(int(name.rpartition("-")[2]), name)

    keeps = {called(name): share for name, share in settings["data"].get("keeps", {}).items()}
    attackers = [
        {**one, "names": [called(name) for name in one.get("names", ())]}
        for one in settings.get("attackers", ())
    ]
    found = {**settings, "data": {**settings["data"], **({"keeps": keeps} if keeps else {})}}
    return {**found, **({"attackers": attackers} if attackers else {})}


@dataclass(frozen=True)
class Federation:
    """What all simulations of a plan share.

    Attributes:
        data: the data folder.
        seen: names of the sets that contributors train on.
        counts: how many training examples each of them has.
        model: a model folder, or a name that simulations know.
        rounds: of the plain mean.
        changes: overrides for all of them, such as the cheap setting.

    """

    data: Path
    seen: tuple[str, ...]
    counts: tuple[int, ...]
    model: str
    rounds: int
    changes: Mapping[str, Any]

    @property
    def common(self) -> dict[str, Any]:
        """The plain mean's settings."""
        found = merged(load(COMMON), self.changes)
        data = {"source": str(self.data), "tasks": list(self.seen), "unseen": []}
        whose = {"model": self.model, "contributors": len(self.seen), "data": data}
        return {**found, **whose, "rounds": self.rounds}

    @property
    def examples(self) -> int:
        """Training examples of a contributor in a round, at most."""
        return int(self.common["train"]["max_examples"])

    def simulation(self, recipe: str, seed: int) -> dict[str, Any]:
        """A recipe's simulation. With fewer epochs a round there are more rounds: equal compute."""
        changes = load(recipe) if recipe != COMMON else {}
        found = merged(self.common, changes)
        epochs = self.common["train"]["epochs"]
        rounds = self.rounds * epochs / found["train"]["epochs"]
        found["data"]["tasks"] = list(self.seen[: found["contributors"]])
        return {**_renamed(found), "seed": seed, "rounds": max(1, round(rounds))}

    def at_once(self) -> dict[str, Any]:
        """All rounds' training as one: as many steps in total, on as many examples."""
        most = self.examples * self.rounds
        each = sum(min(self.examples, count) for count in self.counts) * self.rounds
        there = sum(min(most, count) for count in self.counts)
        epochs = self.common["train"]["epochs"] * each / there
        return {"epochs": round(epochs, 4), "max_examples": most}

    def oneshot(self, seed: int) -> dict[str, Any]:
        """Independent fine-tunes of equal compute, each contributor's its own, and one mean."""
        most, epochs = self.at_once()["max_examples"], self.common["train"]["epochs"]
        each = [
            round(epochs * self.rounds * min(self.examples, count) / min(most, count), 4)
            for count in self.counts
        ]
        others = {
            name: {"epochs": its}
            for name, its in zip(names(len(each)), each, strict=True)
            if its != epochs
        }
        changes = {"seed": seed, "rounds": 1, "train": {"max_examples": most}, "overrides": others}
        return merged(self.common, changes)

    def multitask(self, pooled: Path, seed: int) -> dict[str, Any]:
        """One contributor that holds everybody's examples: what sharing them would give."""
        train = {**self.at_once(), "max_examples": None}
        train["trainer"] = "benchmarks.cold.multitask:create"
        found = merged(self.common, {"seed": seed, "rounds": 1, "contributors": 1, "train": train})
        found["data"] = {"source": str(pooled), "tasks": [pooled.name], "unseen": []}
        found["round"] = merged(found["round"], {"min_contributions": 1})
        return found
