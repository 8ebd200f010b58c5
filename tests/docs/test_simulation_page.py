"""What docs/simulation.md tells researchers to write does what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from coldmerge_simulation import SimulationConfig, simulate
from coldmerge_simulation.contributors.conduct import STRENGTH, Kind
from coldmerge_simulation.data import PARTITIONERS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "simulation.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_sample_of_the_configuration_is_one() -> None:
    samples = [yaml.safe_load(text) for text in blocks("yaml")]
    own = [one for one in samples if "every_other" in str(one)]
    for sample in samples:
        if sample not in own:
            parsed = SimulationConfig.parse({**sample, "contributors": 20})
            assert set(sample) <= parsed.model_fields_set
    assert len(samples) - len(own) >= 2


def test_every_partitioner_and_attack_is_on_the_page() -> None:
    assert set(STRENGTH) == set(get_args(Kind))
    for name in (*PARTITIONERS, *STRENGTH):
        assert f"| `{name}` |" in PAGE, name


def test_a_method_a_partitioner_and_a_trainer_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's package, installed as pip would, and its YAML, run."""
    (package,) = [text for text in blocks("python") if "# my_package.py" in text]
    (points,) = [text for text in blocks("toml") if "coldmerge.partitioners" in text]
    (own,) = [yaml.safe_load(text) for text in blocks("yaml") if "every_other" in text]
    (tmp_path / "my_package.py").write_text(package)
    about = tmp_path / "my_package-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    registered = points.replace("[project.entry-points.", "[").replace('"', "")
    (about / "entry_points.txt").write_text(registered)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)

    def run(name: str, method: str) -> Any:
        settings = {
            "rounds": 1,
            "contributors": 2,
            "evaluate": {"every": 0},
            "data": {**own["data"], "tasks": ["digits-23456"]},
            "train": own["train"],
            "round": {"min_contributions": 2, "gate": None, "merge": {"method": method}},
        }
        return simulate(settings, out=tmp_path / name)

    assert own["round"] == {"merge": {"method": "halved"}}
    found = run("halved", "halved")
    assert found.values["rounds"][0]["accepted"] == ["org-1", "org-2"]
    assert found.digest != run("mean", "mean").digest
