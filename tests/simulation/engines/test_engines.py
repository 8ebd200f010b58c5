"""Every engine comes to the same digests; what cannot start says so."""

from __future__ import annotations

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
from coldmerge_simulation.engines import ray, superlink
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


SAMPLES = Path(__file__).parents[3] / "deploy" / "flower"


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
