"""Every recipe of benchmarks/cold is a simulation when it is laid over the plain mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coldmerge.core import yaml_file
from coldmerge_client.training import TrainConfig
from coldmerge_coordinator.merging.recipes import resolved
from coldmerge_simulation import SimulationConfig
from coldmerge_simulation.config import merged
from coldmerge_simulation.models import train_settings

FOLDER = Path(__file__).parents[2] / "benchmarks" / "cold" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
MEAN: dict[str, Any] = {
    "model": "digits",
    "contributors": 8,
    "train": {"epochs": 2, "lr": 1e-4, "max_examples": 500, "freeze": ["*embeddings*"]},
    "round": {"min_contributions": 2, "gate": None},
}


def laid_over(recipe: Path) -> SimulationConfig:
    found = merged(MEAN, yaml_file.load(recipe))
    return SimulationConfig.parse({**found, "model": "digits"}, FOLDER)


def test_each_policy_has_a_recipe() -> None:
    named = {"adam", "atm", "breadcrumbs", "ema", "iso-c", "lora", "nesterov", "partial", "sam"}
    assert named | {"ties"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_a_recipe_parses_and_says_what_it_follows(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("# ")
    config = laid_over(recipe)
    assert set(yaml_file.load(recipe)) <= config.model_fields_set
    assert resolved(config.round.policy()).merge.method == config.round.merge.method
    assert TrainConfig.parse({**train_settings(config), "data": "."}).epochs in (1, 2)


def test_recipes_change_what_they_are_called_after() -> None:
    found = {recipe.stem: laid_over(recipe) for recipe in RECIPES}
    outers = {name: config.round.merge.outer["method"] for name, config in found.items()}
    for name in ("adam", "ema", "nesterov"):
        assert outers[name] == name
    methods = {name: config.round.merge.method for name, config in found.items()}
    assert (methods["ties"], methods["iso-c"]) == ("ties", "iso_c")
    assert methods["breadcrumbs"] == "breadcrumbs"
    assert found["lora"].train["method"] == "lora"
    assert found["sam"].train["sam"] == {"rho": 0.05}
