"""Simulated rounds that learn their coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Round
from coldmerge_coordinator.verifying import verify_release
from coldmerge_simulation import Simulation, SimulationConfig, simulate
from tests.simulation.settings import digests, settings


def learning(**learns: Any) -> dict[str, Any]:
    """One round of four, of whom one undoes what it learned."""
    gate = {"max_loss": 100, "min_mean_gain": -100}
    merge = {"coefficients": {"probes": 11, **learns}}
    return settings(
        rounds=1,
        consents=["learn_coefficients"],
        attackers=[{"names": ["org-4"], "kind": "sign_flip", "strength": 3}],
        round={"min_contributions": 4, "gate": gate, "merge": merge, "screening": {"clip": None}},
    )


def verified(found: Simulation, scratch: Path) -> tuple[str, list[str]]:
    with Store.open(found.folder / "hub") as store:
        again = verify_release(store, "tiny", 1, scratch)
    return again.answer, again.problems


def test_an_attacker_counts_for_less(tmp_path: Path) -> None:
    found = simulate(learning(), out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert line["state"] == "PUBLISHED"
    learned = {name: kept[""] for name, kept in line["coefficients"].items()}
    assert learned["org-4"] == min(learned.values()) < 0.15
    assert max(learned.values()) > 0.4
    assert verified(found, tmp_path) == ("exact", [])
    assert len(list((found.folder / "models").iterdir())) == 1, "no probe's model is left"
    again = simulate(learning(), out=tmp_path / "again")
    assert digests(again) == digests(found)


@pytest.mark.parametrize(
    "learns",
    [
        {"method": "spsa", "objective": "entropy", "granularity": "layer", "probes": 6},
        {"method": "fork", "objective": "accuracy", "probes": 8},
        {"method": "gradient", "objective": "entropy", "granularity": "layer", "probes": 8},
    ],
    ids=["adamerging", "forkmerge", "slopes"],
)
def test_every_objective_is_answered(tmp_path: Path, learns: dict[str, Any]) -> None:
    values = learning(**learns)
    values["round"]["gate"] = None
    if learns["method"] == "gradient":
        values["round"]["merge"]["method"] = "task_arithmetic"
    found = simulate(values, out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert (line["state"], line["silent"]) == ("PUBLISHED", [])
    layers = {group for kept in line["coefficients"].values() for group in kept}
    assert (len(layers) > 1) == (learns.get("granularity") == "layer")
    assert verified(found, tmp_path) == ("exact", [])


def test_the_example_is_a_simulation() -> None:
    path = Path(__file__).parents[3] / "examples" / "coefficients.yaml"
    rules = SimulationConfig.load(path).round.merge.coefficients
    assert rules is not None
    assert rules.probes == 14


def test_without_consent_two_share_a_coefficient(tmp_path: Path) -> None:
    found = simulate({**learning(probes=4), "consents": []}, out=tmp_path / "run")
    learned = [kept[""] for kept in found.values["rounds"][0]["coefficients"].values()]
    assert sorted(learned.count(one) for one in set(learned)) in ([2, 2], [4])


def test_slopes_find_the_attacker_in_fewer_probes(tmp_path: Path) -> None:
    """Exact slopes of real networks: a step along each axis, and five along the slopes."""
    values = learning(method="gradient", probes=10)
    values["round"]["merge"]["method"] = "task_arithmetic"
    found = simulate(values, out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert (line["state"], line["silent"]) == ("PUBLISHED", [])
    learned = {name: kept[""] for name, kept in line["coefficients"].items()}
    assert learned["org-4"] == min(learned.values()) < 0.1
    assert max(learned.values()) > 0.4
    assert verified(found, tmp_path) == ("exact", [])
    assert len(list((found.folder / "models").iterdir())) == 1, "no probe's model is left"
    with Store.open(found.folder / "hub") as store, store.database.read() as session:
        kept = session.scalars(select(Round)).one().coefficients or {}
        probes = kept["probes"]
    assert [probe["slopes"] is not None for probe in probes] == [n > 4 for n in range(len(probes))]
