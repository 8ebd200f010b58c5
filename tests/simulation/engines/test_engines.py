"""Every engine comes to the same digests; what cannot start says so."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge_simulation import simulate
from coldmerge_simulation.contributors import client_app
from coldmerge_simulation.coordinator import server_app
from coldmerge_simulation.engines import ray, superlink
from coldmerge_simulation.engines.local_grid import LocalGrid
from coldmerge_simulation.engines.processes import Programs, answers
from coldmerge_simulation.flower import compat
from coldmerge_simulation.flower.compat import OFFLINE
from coldmerge_simulation.folder import RunFolder
from tests.simulation.settings import digests, settings
from tests.support import free_ports

GATED = {"min_contributions": 2, "gate": {"max_loss": 100, "min_mean_gain": -100}}


def test_ray_and_local_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = settings(rounds=1, round=GATED)
    local = simulate(values, out=tmp_path / "local")
    run = simulate(values, engine="ray", out=tmp_path / "run")
    assert digests(run) == digests(local)
    assert len(digests(run)) == 2
    assert run.values["rounds"][0]["reason"] == local.values["rounds"][0]["reason"]


def test_a_cluster_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UnavailableError, match=r"simulation\.no_cluster"):
        simulate(settings(), engine="ray", out=tmp_path / "run")
    monkeypatch.setenv("RAY_ADDRESS", "not an address")
    with pytest.raises(ConfigError, match=r"simulation\.bad_cluster"):
        simulate(settings(), engine="ray", out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_port_that_is_no_ray_is_an_error(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setattr(ray, "ANSWER_SECONDS", 1.0)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"{prefix}127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="no word of Ray's"):
            ray.check_cluster(address)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UnavailableError, match="another gRPC service"):
            ray.check_cluster(f"{prefix}127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


def test_a_superlink_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("COLDMERGE_SUPERLINK", f"127.0.0.1:{port}")
    with pytest.raises(UnavailableError, match=r"simulation\.no_superlink"):
        simulate(settings(), engine="federation", out=tmp_path / "run")


@pytest.mark.slow
def test_a_federation_with_tls_and_node_keys_agrees(tmp_path: Path) -> None:
    values = settings(rounds=1, round=GATED)
    local = simulate(values, out=tmp_path / "local")
    run = simulate(values, engine="federation", out=tmp_path / "run")
    assert digests(run) == digests(local)
    assert len(digests(run)) == 2
    kept = {path.name for path in (tmp_path / "run" / "homes").iterdir()}
    assert kept == {"org-1", "org-2", "org-3", "org-4"}
    assert {path.name for path in (tmp_path / "run" / "nodes").glob("*/*")} == {"models", "outbox"}


ROOT = Path(__file__).parents[3]


def test_an_app_without_a_run_makes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `flwr run .` starts, here on the grid in this process."""
    values, out = settings(rounds=1), tmp_path / "run"
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    said: dict[str, bool | float | int | str] = {
        **tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"],
        "config": str(tmp_path / "config.yaml"),
        "out": str(out),
    }
    grid = LocalGrid(client_app.app, 2)
    with grid.running():
        server_app.main(grid, compat.context(7, run_config=said))
    result = json.loads((out / "result.json").read_text())
    local = simulate(values, out=tmp_path / "local")
    assert [row["digest"] for row in result["releases"]] == digests(local)
    assert f"The run's folder is {out}" in capsys.readouterr().out


@pytest.mark.slow
def test_flwr_run_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (port,) = free_ports(1)
    home = superlink.write_connection(RunFolder(tmp_path), f"127.0.0.1:{port}")
    with Programs(home / "logs", {"FLWR_HOME": str(home)}) as programs:
        server = programs.start(
            "superlink",
            "flower-superlink",
            *("--insecure", "--simulation", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(port)),
        )
        programs.until("opened its port", lambda: answers("127.0.0.1", port), server, 300)
        config = f'rounds=1 contributors=4 out="{tmp_path / "run"}"'
        run = programs.start("run", "flwr", "run", ROOT, "--stream", "--run-config", config)
        told = programs.finish(run, 600)
    assert "Release 1 (" in told
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())["releases"]) == 2


SAMPLES = ROOT / "deploy" / "flower"


@pytest.mark.parametrize("name", ["superlink", "supernode"])
def test_the_samples_use_options_that_flower_has(name: str) -> None:
    text = (SAMPLES / f"{name}.sh").read_text()
    assert subprocess.run(["sh", "-n", SAMPLES / f"{name}.sh"], check=False).returncode == 0
    program = Path(sys.executable).parent / f"flower-{name}"
    shown = subprocess.run(
        [program, "--help"], check=True, capture_output=True, text=True, env=os.environ | OFFLINE
    )
    used = set(re.findall(r"(?<=\s)--[a-z-]+", text))
    assert used
    assert used <= set(re.findall(r"--[a-z-]+", shown.stdout))


def test_the_sample_connection_is_what_the_engine_writes(tmp_path: Path) -> None:
    home = superlink.write_connection(
        RunFolder(tmp_path), "superlink.example.org:8000", Path("keys/ca.crt")
    )
    sample = tomllib.loads((SAMPLES / "config.toml").read_text())
    assert tomllib.loads((home / "config.toml").read_text()) == sample


def test_a_port_that_is_taken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ray, "free_ports", lambda _count: [port])
        with pytest.raises(UnavailableError, match=r"simulation\.program_failed") as caught:
            simulate(settings(), engine="ray", out=tmp_path / "run")
    assert "log" in caught.value.ids
