"""Finding contributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coldmerge.core.errors import NotFoundError
from coldmerge_coordinator.store import Store, contributions


def test_a_contribution_is_found_by_id_and_by_manifest(
    store: Store, open_round: Callable[..., str], contribute: Callable[[str, str], None]
) -> None:
    round_id = open_round()
    contribute(round_id, "a")
    with store.database.read() as session:
        row = contributions.admitted_of(session, round_id, "a")
        assert row is not None
        assert contributions.get(session, row.id) is row
        assert contributions.by_manifest(session, row.manifest_digest) is row
        assert contributions.by_manifest(session, "0" * 64) is None
        with pytest.raises(NotFoundError) as caught:
            contributions.get(session, "contribution-0")
    assert caught.value.code == "contribution.unknown"
