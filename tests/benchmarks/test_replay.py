from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.replay import replay
from coldmerge_simulation import simulate
from tests.simulation.settings import digests, settings


def test_a_coordinator_comes_to_the_digests_of_the_simulation(tmp_path: Path) -> None:
    policy = {"min_contributions": 2, "gate": {"max_loss": 100, "min_mean_gain": -100}}
    values = settings(rounds=1, contributors=2, round=policy)
    run = simulate(values, out=tmp_path / "run")
    with tempfile.TemporaryDirectory() as within:  # a Unix socket needs a short path
        found = replay(run.folder, Path(within))
    assert [release.replayed for release in found] == digests(run)
    assert len(found) == 2
    assert all(release.equal for release in found)
