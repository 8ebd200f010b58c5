"""New keys for a machine: the old ones end, and what they signed stays good."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from coldmerge.core.clock import SystemClock
from coldmerge.core.errors import ConflictError, ManifestError, UnauthenticatedError
from coldmerge.wire.invitation import Invitation
from coldmerge_client import files, renewal, sent_log
from coldmerge_client.enrol import join
from coldmerge_client.home import Home
from coldmerge_client.outbox import Outbox
from coldmerge_client.renewal import renew
from coldmerge_client.session import Session
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store.models import Machine
from tests.client.test_outbox import add
from tests.harness import MODEL, Live, coordinator


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with coordinator(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def home(live: Live, tmp_path: Path) -> Home:
    return _join(live, tmp_path / "home", live.token("org-a"))


def _join(live: Live, path: Path, token: str, machine: str = "box") -> Home:
    home = Home(path)
    invitation = Invitation(
        federation="test",
        address=live.servers.addresses.api,
        enrol=live.servers.addresses.enrol,
        token=token,
        root=live.authority.root_pem.decode(),
    )
    join(invitation.render(), live.authority.fingerprint, home, machine)
    return home


def _public(home: Home) -> bytes:
    return home.identity_key().public_key().public_bytes_raw()


def _known(live: Live) -> bytes:
    with live.store.database.read() as session:
        return session.get_one(Machine, ("org-a", "box")).identity_public_key


def _entry(home: Home, state: str) -> None:
    """Something in the outbox, signed by today's key."""
    entry = add(home)
    if state == "refused":
        Outbox(home).refuse(entry, "test")


def test_both_keys_change_and_the_old_ones_are_refused(live: Live, home: Home) -> None:
    keys = (home.path / "keys").glob("*.key")
    before = {path.name: path.read_bytes() for path in keys}
    certificate = home.certificate.read_bytes()
    sent_log.record(home, "push", {"model": MODEL}, SystemClock().now())
    _entry(home, "refused")
    with Session.open(home) as open_already:
        assert open_already.models()
        renew(home, new_keys=True)
        assert open_already.models()
    after = {path.name: path.read_bytes() for path in (home.path / "keys").glob("*.key")}
    assert all(before[name] != after[name] for name in before)
    assert _known(live) == _public(home)
    assert not home.next_keys.exists()
    sent_log.record(home, "push", {"model": MODEL}, SystemClock().now())
    assert [line.event for line in sent_log.read(home)] == ["join", "push", "new-keys", "push"]
    assert [entry.state for entry in Outbox(home).entries()] == ["refused"]
    renew(home, new_keys=True)
    assert len(sent_log.read(home)) == 5
    for name, content in before.items():
        (home.path / "keys" / name).write_bytes(content)
    home.certificate.write_bytes(certificate)
    with Session.open(home) as session, pytest.raises(UnauthenticatedError) as caught:
        session.models()
    assert caught.value.code == "auth.unknown_machine"
    with pytest.raises(ManifestError):
        renew(home)


def test_an_answer_that_was_lost_is_fetched_again(
    live: Live, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _public(home)

    def lost(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "check_chain", lost)
        with pytest.raises(KeyboardInterrupt):
            renew(home, new_keys=True)
    assert _known(live) != old == _public(home)
    with Session.open(home) as session:
        assert session.models()
    assert _known(live) == _public(home)
    assert [line.event for line in sent_log.read(home)] == ["join", "new-keys"]


@pytest.mark.parametrize("step", range(4))
def test_a_change_of_keys_that_was_cut_short_goes_on(
    live: Live, home: Home, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    real, done = files.write_atomic, list[Path]()

    def dies(path: Path, data: bytes, mode: int = 0o600) -> None:
        if home.next_keys not in path.parents:
            if len(done) == step:
                raise KeyboardInterrupt
            done.append(path)
        real(path, data, mode)

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "write_atomic", dies)
        if step < 3:
            with pytest.raises(KeyboardInterrupt):
                renew(home, new_keys=True)
        else:
            renew(home, new_keys=True)
    assert sent_log.read(home)
    with Session.open(home) as session:
        assert session.models()
    assert _known(live) == _public(home)
    assert sent_log.read(home)[-1].event == "new-keys"


@pytest.mark.parametrize("written", [(), ("identity.key",)])
def test_new_keys_that_were_not_made_to_the_end_stop_no_renewal(
    live: Live, home: Home, monkeypatch: pytest.MonkeyPatch, written: tuple[str, ...]
) -> None:
    real = files.write_atomic

    def dies(path: Path, data: bytes, mode: int = 0o600) -> None:
        if path.name not in written:
            path.parent.mkdir(exist_ok=True)
            raise KeyboardInterrupt
        real(path, data, mode)

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "write_atomic", dies)
        with pytest.raises(KeyboardInterrupt):
            renew(home, new_keys=True)
    before = home.certificate.read_bytes()
    renew(home)
    assert home.certificate.read_bytes() != before
    renew(home, new_keys=True)
    assert _known(live) == _public(home)


@pytest.mark.parametrize("first", ["identity.key", "tls.key", "certificate.pem"])
def test_keys_that_have_moved_are_forgotten_in_one_step(
    live: Live, home: Home, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    def dies(path: Path, **_: object) -> None:
        if (path / first).exists():
            (path / first).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            renew(home, new_keys=True)
    with Session.open(home) as session:
        assert session.models()
    renew(home)
    renew(home, new_keys=True)
    assert _known(live) == _public(home)
    assert [path.name for path in sorted((home.path / "keys").iterdir())] == [
        "identity.key",
        "tls.key",
    ]


def test_two_processes_change_the_keys_once(live: Live, home: Home) -> None:
    renewal._make_next(home)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(renew, home) for _ in range(4)]:
            done.result()
    assert _known(live) == _public(home)
    assert [line.event for line in sent_log.read(home)] == ["join", "new-keys"]


def test_keys_do_not_change_under_what_waits_to_be_sent(live: Live, home: Home) -> None:
    _entry(home, "prepared")
    with pytest.raises(ConflictError) as caught:
        renew(home, new_keys=True)
    assert caught.value.code == "renew.outbox_not_empty"
    assert _known(live) == _public(home)


def test_a_lost_key_is_replaced_by_an_invitation_for_that_machine(
    live: Live, home: Home, tmp_path: Path
) -> None:
    with pytest.raises(ConflictError) as caught:
        _join(live, tmp_path / "again", live.token("org-a"))
    assert caught.value.code == "enrolment.machine_exists"
    named = admin.invite(
        live.store, "org-a", "contributor", timedelta(hours=1), live.clock.now(), machine="box"
    )
    with pytest.raises(ConflictError) as caught:
        _join(live, tmp_path / "other", named.token, "laptop")
    assert caught.value.code == "enrolment.other_machine"
    again = _join(live, tmp_path / "anew", named.token)
    with Session.open(again) as session:
        assert session.models()
    with Session.open(home) as session, pytest.raises(UnauthenticatedError):
        session.models()
    with pytest.raises(ManifestError):
        renew(home)
