"""`coldmerge simulate --sweep` and `coldmerge compare`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command

SMALL = """
name: small
rounds: 1
contributors: 2
data: {tasks: [digits-23456], unseen: []}
train: {epochs: 1}
round: {min_contributions: 2, gate: null}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_sweep_ends_with_a_table_a_chart_and_json(
    coldmerge: Command, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    typed = ["simulate", file, "--sweep", "round.merge.method=mean,median", "--out", out]
    shown = coldmerge(*typed).out
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["method=mean", "method=median"]
    assert f"Chart: {out / 'sweep.html'}" in shown
    page = (out / "sweep.html").read_text()
    assert "method=median" in page
    assert "<svg" in page
    again = coldmerge(*typed, "--format", "json").json
    assert json.loads((out / "sweep.json").read_text()) == again
    runs = [out / f"method={method}/seed-0" for method in ("mean", "median")]

    picture = tmp_path / "curves.svg"
    shown = coldmerge("compare", *runs, "--picture", picture).out
    assert "round.merge.method" in shown
    assert picture.read_text().startswith("<svg")
    found = coldmerge("compare", *runs, "--format", "json").json
    assert found["settings"] == {"round.merge.method": ["mean", "median"]}
    assert found["differences"][0]["unpaired"] == []


def test_what_failed_is_said_and_decides_the_status(
    coldmerge: Command, file: Path, tmp_path: Path
) -> None:
    typed = ["simulate", file, "--sweep", "contributors=900", "--out", tmp_path / "out"]
    found = coldmerge(*typed)
    assert found.status == 1
    assert "contributors=900, seed 0:" in found.err
    assert "simulation.too_few_examples" in found.err
    found = coldmerge("compare", tmp_path / "out")
    assert (found.status, "simulation.no_result" in found.err) == (6, True)


def test_a_wrong_sweep_is_a_sentence(coldmerge: Command, file: Path) -> None:
    found = coldmerge("simulate", file, "--sweep", "method")
    assert found.status == 2
    assert "KEY=VALUE" in found.err
