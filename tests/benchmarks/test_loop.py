from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.loop import benchmark
from benchmarks.synthetic import shapes


@pytest.fixture
def within() -> Iterator[Path]:
    """A short path: a Unix socket below pytest's own would be too long."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_small_run_measures_every_phase(within: Path) -> None:
    figures = benchmark(8_000_000, 1, within)
    assert [phase["phase"] for phase in figures["phases"]] == [
        "import",
        "pull",
        "extract and push",
        "merge and publish",
        "export",
    ]
    assert all(phase["seconds"] > 0 for phase in figures["phases"])
    peaks = figures["peak_private_bytes"]
    assert set(peaks) == {"client", "coordinator", "export", "import", "worker"}
    assert all(10**6 < used < 10**9 for used in peaks.values())
    assert list(within.iterdir()) == []


def test_sizes_are_close_to_what_was_asked_for() -> None:
    for asked in (10**5, 10**8, 2 * 10**9):
        found = sum(4 * rows * columns for rows, columns in shapes(asked).values())
        assert 0.75 * asked < found <= asked
