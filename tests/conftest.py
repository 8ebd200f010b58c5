"""Fixtures for tests that need a whole federation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation import Federation


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """A coordinator that is initialized, not yet serving; everything is ended afterwards."""
    made = Federation.make(tmp_path)
    yield made
    made.close()
