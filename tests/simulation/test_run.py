"""Simulations from end to end, with the engine `local`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ColdmergeError, ConfigError, ConflictError
from coldmerge_coordinator.store import Store, contributions
from coldmerge_coordinator.store.models import Contribution
from coldmerge_simulation import SimulationConfig, simulate
from coldmerge_simulation.models import train_settings
from coldmerge_simulation.run import Simulation
from tests.simulation.settings import digests, settings


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    return simulate(settings(evaluate={"every": 1}), out=tmp_path_factory.mktemp("runs") / "a")


def test_rounds_publish_releases_of_everybody(done: Simulation) -> None:
    values = done.values
    assert [row["number"] for row in values["releases"]] == [0, 1, 2]
    assert len(set(digests(done))) == 3
    assert [line["state"] for line in values["rounds"]] == ["PUBLISHED"] * 2
    assert values["rounds"][0]["accepted"] == ["org-1", "org-2", "org-3", "org-4"]
    assert values["peak_bytes"] > 0
    assert all(row["seen"]["mean"] > 20 for row in values["releases"])


def test_data_frames_say_the_same(done: Simulation) -> None:
    assert list(done.releases["digest"]) == digests(done)
    assert set(done.scores["task"]) == {"digits-234", "digits-456"}
    assert list(done.contributions["outcome"]) == ["accepted"] * 8
    assert done.digest == digests(done)[-1]


def test_the_same_seed_gives_the_same_digests_and_another_does_not(
    done: Simulation, tmp_path: Path
) -> None:
    again = simulate(settings(), out=tmp_path / "again")
    assert digests(again) == digests(done)
    other = simulate(settings(rounds=1), seed=4, out=tmp_path / "other")
    assert digests(other)[1] != digests(done)[1]


def test_contributions_are_receipted_by_the_coordinator(done: Simulation) -> None:
    with Store.open(done.folder / "hub") as store, store.database.read() as session:
        rows = list(session.query(Contribution))
        assert len(rows) == 8
        assert {row.state for row in rows} == {contributions.ADMITTED}
        assert all(row.receipt and store.payloads.exists(row.payload) for row in rows)


def test_the_gate_judges_paired_evaluations(tmp_path: Path) -> None:
    gate = {"max_loss": 100, "min_mean_gain": -100}
    changes = {"round": {"min_contributions": 2, "gate": gate}, "rounds": 1}
    found = simulate(settings(**changes), out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert line["state"] == "PUBLISHED"
    assert "over 4 evaluators" in line["reason"]
    refused = {"round": {"min_contributions": 2, "gate": {**gate, "min_mean_gain": 100}}}
    found = simulate(settings(**{**changes, **refused}), out=tmp_path / "other")
    assert found.values["rounds"][0]["state"] == "REJECTED"
    assert len(found.values["releases"]) == 1


def test_attackers_with_nan_are_refused_and_dropouts_and_late_ones_counted(tmp_path: Path) -> None:
    changes = {
        "rounds": 1,
        "attackers": [{"names": ["org-3"], "kind": "nan"}],
        "participation": {
            "stragglers": {"share": 0.25, "slowdown": 100},
            "duration": {"distribution": "fixed", "seconds": 60},
        },
        "round": {"min_contributions": 2, "gate": None, "duration": "10m"},
    }
    found = simulate(settings(**changes), out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert line["attackers"] == ["org-3"]
    assert [item["code"] for item in line["refused"]] == ["payload.not_finite"]
    assert len(line["late"]) == 1
    assert len(line["accepted"]) + len(line["late"]) + len(line["refused"]) == 4
    assert line["state"] == "PUBLISHED"


def test_a_quorum_that_is_missed_abandons_the_round(tmp_path: Path) -> None:
    changes = {"participation": {"dropout": 1.0}, "rounds": 2}
    found = simulate(settings(**changes), out=tmp_path / "run")
    assert [line["state"] for line in found.values["rounds"]] == ["ABANDONED"] * 2
    assert found.values["rounds"][0]["dropped"] == ["org-1", "org-2", "org-3", "org-4"]
    assert digests(found) == digests(found)[:1]


def test_another_configuration_is_not_resumed(done: Simulation) -> None:
    with pytest.raises(ConflictError, match=r"simulation\.folder_not_empty"):
        simulate(settings(evaluate={"every": 1}), out=done.folder)
    changed = settings(evaluate={"every": 1}, train={"epochs": 2})
    with pytest.raises(ConflictError, match=r"simulation\.other_config") as caught:
        simulate(changed, out=done.folder, resume=True)
    assert caught.value.ids["key"] == "train.epochs"
    assert (caught.value.expected, caught.value.got) == ("1", "2")


def test_a_finished_run_is_only_read(done: Simulation) -> None:
    again = simulate(settings(evaluate={"every": 1}, at_a_time=2), out=done.folder, resume=True)
    assert again.values == done.values


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"round": {"merge": {"method": "mena"}}}, "mena"),
        ({"model": "no/such/folder"}, "model"),
        ({"nodes": 3}, "nodes"),
        ({"train": {"epohs": 3}}, "epohs"),
        ({"train": {"threads": 3}}, "threads"),
        ({"overrides": {"org-4": {"epohs": 3}}}, "epohs"),
        ({"overrides": {"org-4": {"seed": 3}}}, "seed"),
        ({"overrides": {"org-5": {"epochs": 3}}}, "org-5 in overrides"),
        ({"data": {"keeps": {"org-04": 0.1}}}, "org-04 in data.keeps"),
        ({"data": {"keeps": {"org-4": 0}}}, "keeps"),
        ({"data": {"partition": {"by": "magic"}}}, "magic"),
        ({"round": {"min_contributions": 9}}, "min_contributions"),
        ({"attackers": [{"count": 9, "kind": "nan"}]}, "attackers"),
    ],
)
def test_a_wrong_configuration_names_the_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ColdmergeError) as caught:
        simulate(settings(**changes), out=tmp_path / "run")
    assert key in f"{caught.value}"


def test_an_unknown_engine_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"simulation\.unknown_engine") as caught:
        simulate(settings(), engine="spark", out=tmp_path / "run")
    assert caught.value.expected == "local or ray or federation"
    assert not (tmp_path / "run").exists()


def test_the_configuration_is_read_back_from_json() -> None:
    config = SimulationConfig.parse(settings(attackers=[{"count": 1, "kind": "noise"}]))
    assert SimulationConfig.parse(config.to_json()) == config


def test_one_contributor_trains_otherwise(tmp_path: Path) -> None:
    """What the others send stays the same: only one of four inputs of the merge differs."""

    def sent(name: str, **changes: Any) -> dict[str, float]:
        found = simulate(settings(rounds=1, **changes), out=tmp_path / name)
        assert found.values["rounds"][0]["bytes"] > 4 * 80_000
        with Store.open(found.folder / "hub") as store, store.database.read() as session:
            return {row.contributor: row.norm for row in session.query(Contribution)}

    plain = sent("plain")
    other = sent("other", overrides={"org-2": {"epochs": 3}})
    same = sent("same", overrides={"org-2": {"epochs": 1}})
    assert {name for name in plain if plain[name] != other[name]} == {"org-2"}
    assert plain == same


def test_sections_of_overrides_are_joined_with_those_of_everybody() -> None:
    train = {"epochs": 1, "evaluate": {"max_examples": 9}}
    values = settings(train=train, overrides={"org-1": {"evaluate": {"after_training": False}}})
    config = SimulationConfig.parse(values)
    mine, others = train_settings(config, "org-1"), train_settings(config, "org-2")
    assert mine["evaluate"] == {"after_training": False, "max_examples": 9}
    assert others == {**mine, "evaluate": {"max_examples": 9}}
    assert others == train_settings(config)


def test_some_are_asked_by_their_number(tmp_path: Path) -> None:
    values = settings(rounds=1, participation={"count": 3})
    values["round"] = {"min_contributions": 3, "gate": None}
    found = simulate(values, out=tmp_path / "run")
    assert len(found.values["rounds"][0]["accepted"]) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"attackers": [{"names": ["org-9"], "kind": "nan"}]},
        {"participation": {"count": 5}},
        {"round": {"min_contributions": 2, "merge": {"method": "tiez"}}},
    ],
    ids=["attacker", "count", "method"],
)
def test_a_corrected_configuration_finds_the_folder_empty(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError):
        simulate(settings(rounds=1, **wrong), out=out)
    assert not list(out.iterdir())
    assert simulate(settings(rounds=1), out=out).values["rounds"]


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.write_text("notes")
    with pytest.raises(ConflictError, match=r"simulation\.no_folder_there"):
        simulate(settings(), out=out)
    assert out.read_text() == "notes"
