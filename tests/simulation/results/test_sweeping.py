from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge_simulation.results.comparing import compare, load, summary
from coldmerge_simulation.results.sweeping import Sweep, changed, sweep, variants

SMALL: dict[str, Any] = {
    "model": "digits",
    "rounds": 2,
    "contributors": 3,
    "train": {"epochs": 1},
    "round": {"min_contributions": 2, "gate": None},
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two methods, one of which cannot merge what is sent, with two seeds."""
    chosen = variants(["round.merge.method=mean,ties"])
    return sweep(SMALL, chosen, seeds=2, out=tmp_path_factory.mktemp("sweep") / "out")


def test_a_sweep_runs_every_variant_with_every_seed(swept: Sweep) -> None:
    assert [cell.label for cell in swept.cells] == ["method=mean", "method=ties"]
    assert all(set(cell.runs) == {0, 1} and not cell.failed for cell in swept.cells)
    digests = {summary(run)["digest"] for cell in swept.cells for run in cell.runs.values()}
    assert len(digests) == 4
    rows = swept.rows()
    assert [row["seeds"] for row in rows] == [2, 2]
    assert rows[0]["seen against first"] is None
    assert "(" in rows[1]["seen against first"]
    assert "failed" not in rows[0]
    json.dumps(swept.as_json())
    assert len(swept.frame) == 4
    assert list(swept.frame["round.merge.method"]) == ["mean", "mean", "ties", "ties"]
    assert {(p.run, p.group, p.release) for p in swept.points()} == {
        (label, group, number)
        for label in ("method=mean", "method=ties")
        for group in ("seen", "unseen")
        for number in (0, 1, 2)
    }


def test_a_sweep_goes_on_with_what_is_new(swept: Sweep) -> None:
    steps: list[str] = []
    chosen = variants(["round.merge.method=mean,median"])

    def progress(step: str, done: int, total: int) -> None:
        steps.append(step)

    again = sweep(SMALL, chosen, seeds=1, out=swept.folder, progress=progress)
    assert steps
    assert all("method=median" in step for step in steps)
    first = swept.cells[0].runs[0].result["releases"]
    assert again.cells[0].runs[0].result["releases"] == first
    with pytest.raises(ConflictError, match=r"another train\.epochs"):
        sweep({**SMALL, "train": {"epochs": 2}}, chosen, seeds=1, out=swept.folder)


def test_what_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    chosen: dict[str, dict[str, Any]] = {"many": {"contributors": 900}, "few": {"rounds": 1}}
    found = sweep(SMALL, chosen, seeds=[3], out=tmp_path / "out")
    assert found.cells[0].failed[3].code == "simulation.too_few_examples"
    assert set(found.cells[1].runs) == {3}
    assert [row["failed"] for row in found.rows()] == ["simulation.too_few_examples", None]
    assert found.rows()[0]["seen"] is None
    assert found.as_json()["variants"][0]["failed"][0]["seed"] == 3


def test_runs_are_laid_side_by_side(swept: Sweep) -> None:
    runs = [load(swept.folder / cell.label / "seed-0", cell.label) for cell in swept.cells]
    answer = compare(runs)
    json.dumps(answer)
    assert [row["run"] for row in answer["runs"]] == ["method=mean", "method=ties"]
    assert answer["settings"] == {"round.merge.method": ["mean", "ties"]}
    (found,) = answer["differences"]
    assert found["unpaired"] == []
    gained = answer["runs"][1]["seen"] - answer["runs"][0]["seen"]
    assert found["seen"]["mean"] == pytest.approx(gained, abs=1e-3)
    assert found["seen"]["pairs"] == len(found["seen"]["tasks"]) == 3
    other = load(swept.folder / "method=mean/seed-1")
    assert compare([runs[0], other])["differences"][0]["unpaired"] == ["seed"]
    itself = compare([runs[0], runs[0]])
    assert itself["settings"] == {}
    assert itself["differences"][0]["seen"]["mean"] == 0


def test_a_result_that_was_printed_is_read_too(swept: Sweep, tmp_path: Path) -> None:
    run = swept.cells[0].runs[0]
    (tmp_path / "run.json").write_text(json.dumps(run.result))
    assert summary(load(tmp_path / "run.json", "a")) == {**summary(run), "run": "a"}


def test_combinations_are_called_by_what_differs() -> None:
    found = variants(["round.merge.method=mean,ties", "attackers.0.count=1,2"])
    assert next(iter(found)) == "method=mean count=1"
    assert found["method=ties count=2"] == {"round.merge.method": "ties", "attackers.0.count": 2}
    twice = variants(["train.share=1", "participation.share=0.5"])
    assert list(twice) == ["train.share=1 participation.share=0.5"]
    (tables,) = variants(["round.gate={max_loss: 5}"]).values()
    assert tables == {"round.gate": {"max_loss": 5}}
    assert list(variants([])) == [""]


def test_settings_are_put_in_their_places() -> None:
    raw = {"attackers": [{"count": 1}], "train": None, "data": {"partition": "iid"}}
    found = changed(raw, {"attackers.0.count": 2, "train.lr": 0.1, "round.merge.method": "ties"})
    assert found["attackers"] == [{"count": 2}]
    assert (found["train"], found["round"]) == ({"lr": 0.1}, {"merge": {"method": "ties"}})
    assert raw["attackers"] == [{"count": 1}]
    for key in ("attackers.1.count", "attackers.x", "data.partition.alpha", "attackers.0.count.a"):
        with pytest.raises(ConfigError, match="no place for"):
            changed(raw, {key: 1})


def wrong(what: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        what()
    return caught.value.code


def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(*texts: str, seeds: int = 1) -> Sweep:
        return sweep(SMALL, variants(texts), seeds=seeds, out=out)

    assert wrong(lambda: run("round.merge.method")) == "simulation.bad_sweep"
    assert wrong(lambda: run("round.merge.method=")) == "simulation.bad_sweep"
    assert wrong(lambda: run("rounds=[")) == "simulation.bad_sweep"
    assert wrong(lambda: run("round.merge.method=mean,maen")) == "merge.unknown_method"
    assert wrong(lambda: run("rounds=2,0")) == "simulation.bad_config"
    assert wrong(lambda: run("data.partition.by=iid,idd")) == "simulation.unknown_partitioner"
    assert wrong(lambda: run("rounds=2", seeds=0)) == "simulation.bad_sweep_size"
    assert wrong(lambda: sweep(SMALL, {}, out=out)) == "simulation.bad_sweep_size"
    assert not out.exists()
