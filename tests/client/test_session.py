from __future__ import annotations

import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from coldmerge.wire.v1 import common_pb2
from coldmerge_client.home import Home
from coldmerge_client.renewal import renew
from coldmerge_client.session import Session
from tests.client.conftest import Coordinator


def test_a_home_that_has_not_joined_has_no_session(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not joined"):
        Session.open(Home(tmp_path))


def test_the_only_model_needs_no_name(session: Session) -> None:
    model = session.model()
    assert (model.name, model.latest_number) == ("m", 0)
    assert list(model.private_patterns) == ["classifier.*"]
    with pytest.raises(NotFoundError) as error:
        session.model("other")
    assert error.value.expected == "m"
    assert session.newest_round("m") is None


def test_a_coordinator_that_is_away_ends_in_an_error_in_time(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = coordinator.join(tmp_path / "home")
    coordinator.stop()
    told: list[float] = []
    began = time.monotonic()
    with (
        Session.open(home, timeout=2, on_retry=lambda _error, wait: told.append(wait)) as session,
        pytest.raises(UnavailableError),
    ):
        session.models()
    assert 0.5 < time.monotonic() - began < 10
    assert told
    with (
        Session.open(home, timeout=0) as session,
        pytest.raises(UnavailableError),
    ):
        next(session.watch_round("m"))


def test_a_call_waits_for_a_coordinator_that_comes_back(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = coordinator.join(tmp_path / "home")
    coordinator.stop(signal.SIGKILL)
    started: list[bool] = []

    def start_once(error: UnavailableError, wait: float) -> None:
        if not started:
            started.append(True)
            coordinator.start()

    with Session.open(home, timeout=30, on_retry=start_once) as session:
        assert session.models()
    assert started


def test_watching_goes_on_over_a_restart(coordinator: Coordinator, session: Session) -> None:
    opened = coordinator.open_round(min_contributions=2)
    watch = session.watch_round("m")
    assert next(watch).id == opened.id
    coordinator.stop(signal.SIGKILL)
    coordinator.start()
    again = next(watch)
    assert (again.id, again.state) == (opened.id, common_pb2.Round.OPEN)
    watch.close()


def test_two_sessions_of_one_home_share_a_renewed_certificate(
    coordinator: Coordinator, session: Session
) -> None:
    session.models()
    session.home.certificate.unlink()
    with Session.open(session.home) as second:
        second.models()
    assert session.models()


class Later:
    """The machine's clock, some time ahead."""

    def __init__(self, by: timedelta) -> None:
        self.by = by

    def now(self) -> datetime:
        return datetime.now(UTC) + self.by


def test_a_renewal_that_fails_stops_nothing_while_the_certificate_holds(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = coordinator.join(tmp_path / "home")
    member = home.membership()
    home.save_membership(replace(member, enrol="localhost:1"))
    clock = Later(timedelta(hours=20))
    warnings: list[ColdmergeError] = []
    with Session.open(home, timeout=0.5, clock=clock) as session:
        session.on_warning = warnings.append
        assert session.models()
        assert session.models()
        assert [type(warning) for warning in warnings] == [UnavailableError]
        clock.by += timedelta(minutes=6)
        assert session.models()
        assert len(warnings) == 2
        home.save_membership(member)
        before = home.certificate.read_bytes()
    with Session.open(home, timeout=5, clock=Later(timedelta(hours=20))) as session:
        with pytest.raises(PermissionDeniedError):  # this clock is too far ahead to renew
            renew(home, clock=clock)
        assert session.models()
    assert home.certificate.read_bytes() == before
    home.save_membership(replace(member, enrol="localhost:1"))
    expired = Session.open(home, timeout=0.5, clock=Later(timedelta(hours=25)))
    with expired as session, pytest.raises(UnavailableError):
        session.models()
