"""Quotas by day."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from coldmerge.core.errors import ResourceError
from coldmerge_coordinator.store import Store, usage
from coldmerge_coordinator.store.models import Contributor


def test_a_quota_starts_again_the_next_day(store: Store, now: datetime) -> None:
    with store.database.write() as session:
        session.add(Contributor(name="org", role="contributor", created_at=now))
    for day in range(2):
        at = now + timedelta(days=day)
        with store.database.write() as session:
            usage.charge(session, "org", 60, 100, at)
        with pytest.raises(ResourceError) as caught, store.database.write() as session:
            usage.charge(session, "org", 41, 100, at)
        assert caught.value.got == "60 bytes and 41 more"
        with store.database.write() as session:
            usage.charge(session, "org", 40, 100, at)
            assert usage.of_day(session, "org", at).received_bytes == 100
