"""A running coordinator per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Live, coordinator


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with coordinator(tmp_path / "hub") as running:
        yield running
