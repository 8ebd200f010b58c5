"""Every engine comes to the same digests; what cannot start says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge_simulation import simulate
from tests.simulation.settings import digests, settings
from tests.support import free_ports

GATED = {"min_contributions": 2, "gate": {"max_loss": 100, "min_mean_gain": -100}}


def test_ray_and_local_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = settings(rounds=1, round=GATED)
    local = simulate(values, out=tmp_path / "local")
    ray = simulate(values, engine="ray", out=tmp_path / "ray")
    assert digests(ray) == digests(local)
    assert len(digests(ray)) == 2
    assert ray.values["rounds"][0]["reason"] == local.values["rounds"][0]["reason"]


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
