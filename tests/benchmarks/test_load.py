from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from benchmarks import flower_overhead, load, soak


@pytest.mark.slow
def test_an_upload_beside_a_small_crowd() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = load.benchmark(4_000_000, 20, 1, Path(folder))
        assert list(Path(folder).iterdir()) == []
    assert [run.beside for run in figures.runs] == [False, True]
    assert 0 < figures.speed_kept < 10
    assert 0 < figures.health_p99_ms < 10_000
    assert 10**6 < figures.coordinator_peak_bytes < 10**9


@pytest.mark.slow
def test_a_few_rounds_of_soak() -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = soak.benchmark(4, 2, Path(folder))
        assert list(Path(folder).iterdir()) == []
    assert samples[-1].rounds == 4
    assert set(samples[-1].private) == {"api", "worker", "clients"}
    assert all(count > 3 for count in samples[-1].descriptors.values())


@pytest.mark.slow
def test_a_round_beside_plain_flower() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = flower_overhead.benchmark(4_000_000, 2, 1, Path(folder))
        assert list(Path(folder).iterdir()) == []
    assert [run.system for run in figures.runs] == ["flower", "coldmerge"]
    assert all(0 < run.published <= run.seconds for run in figures.runs)
    assert all(run.server_bytes > 10**7 for run in figures.runs)
    assert figures.faster > 0
    assert figures.memory > 0
