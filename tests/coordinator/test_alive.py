from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge_coordinator import replica
from coldmerge_coordinator.alive import check
from tests.harness import coordinator


def test_the_api_is_asked_over_its_socket(tmp_path: Path) -> None:
    with coordinator(tmp_path / "hub") as live:
        check(live.folder)
        with pytest.raises(UnavailableError):
            check(live.folder, ("api", "driver"))
        live.stop()
        with pytest.raises(UnavailableError) as caught:
            check(live.folder)
        assert caught.value.code == "health.not_serving"
        live.start()
        check(live.folder)


def test_the_other_parts_hold_their_lock(tmp_path: Path) -> None:
    for part in ("driver", "worker"):
        with pytest.raises(UnavailableError, match=part):
            check(tmp_path, (part,))
        with replica.only_process(tmp_path, part):
            check(tmp_path, (part,))
        with pytest.raises(UnavailableError, match=part):
            check(tmp_path, (part,))


def test_an_unknown_part(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        check(tmp_path, ("kitchen",))
