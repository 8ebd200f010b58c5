"""A running coordinator per test, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coldmerge_coordinator.store import rounds
from coldmerge_coordinator.store.models import Contribution, Round
from tests.harness import Live, coordinator


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with coordinator(tmp_path / "hub") as running:
        yield running


def current(live: Live, round_: Round) -> Round:
    """The round as it is now."""
    with live.store.database.read() as session:
        return rounds.get(session, round_.id)


def rows_of(live: Live) -> list[Contribution]:
    """All contributions, the oldest first."""
    with live.store.database.read() as session:
        return list(session.query(Contribution).order_by(Contribution.accepted_at))
