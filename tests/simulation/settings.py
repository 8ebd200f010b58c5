"""What tests simulate: four contributors, two tasks, two quick rounds without a gate."""

from __future__ import annotations

from typing import Any

from coldmerge_simulation import Simulation


def settings(**changes: Any) -> dict[str, Any]:
    """The configuration, with these keys otherwise."""
    values: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "rounds": 2,
        "contributors": 4,
        "data": {"source": "digits", "tasks": ["digits-234", "digits-456"], "unseen": []},
        "train": {"epochs": 1},
        "round": {"min_contributions": 2, "gate": None},
        "evaluate": {"every": 0},
    }
    return {**values, **changes}


def digests(found: Simulation) -> list[str]:
    """The content digests of a run's releases."""
    return [row["digest"] for row in found.values["releases"]]
