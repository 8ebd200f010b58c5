"""`coldmerge simulate` at the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from coldmerge.cli.app import app
from coldmerge_simulation import SimulationConfig
from tests.simulation.settings import settings

ROOT = Path(__file__).parents[2]


def test_the_result_is_json_with_releases(tmp_path: Path) -> None:
    config = tmp_path / "simulate.yaml"
    config.write_text(yaml.safe_dump(settings(rounds=1)))
    command = ["simulate", str(config), "--seed", "7", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--format", "json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["engine"], found["seed"], found["name"]) == ("local", 7, "tiny")
    assert [row["number"] for row in found["releases"]] == [0, 1]
    assert all(len(row["digest"]) == 64 for row in found["releases"])
    shown = CliRunner().invoke(app, [*command, "--resume"])
    assert found["releases"][1]["digest"][:12] in shown.stdout


def test_the_sample_is_a_simulation_of_seconds() -> None:
    config = SimulationConfig.load(ROOT / "examples" / "simulate.yaml")
    assert config.contributors * config.rounds <= 50
    assert config.round.gate is not None


@pytest.mark.parametrize("package", ["flwr", "sqlalchemy", "torch"])
def test_a_missing_package_names_the_extra(tmp_path: Path, package: str) -> None:
    """In a process of its own, where the package cannot be found."""
    script = f"""
import sys, importlib.metadata as metadata
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
real = metadata.version
def version(name):
    if name == {package!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
sys.argv = ["coldmerge", "simulate", "none.yaml"]
from coldmerge.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "simulation.no_flower" in done.stderr or "simulation.missing_extra" in done.stderr
    assert "coldmerge[simulation]" in done.stderr
    assert "Traceback" not in done.stderr
