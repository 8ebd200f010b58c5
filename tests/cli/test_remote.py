"""Every admin command over the network: as an enrolled machine with the role admin."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import coldmerge.cli as cli
from coldmerge.wire.invitation import Invitation
from coldmerge_client.enrol import join
from coldmerge_client.home import Home
from coldmerge_coordinator.store.models import Round
from tests.cli.conftest import Command
from tests.harness import MODEL, Live, coordinator, deltas


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with coordinator(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def as_role(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on this is a machine of an organization with that role, far from the folder."""

    def become(role: str) -> None:
        addresses = live.servers.addresses
        home = Home(tmp_path / f"home-{role}")
        invitation = Invitation(
            federation="test",
            address=addresses.api,
            enrol=addresses.enrol,
            token=live.token(f"org-{role}", role),
            root=live.authority.root_pem.decode(),
        )
        join(invitation.render(), live.authority.fingerprint, home, "box")
        monkeypatch.setenv("COLDMERGE_HOME", str(home.path))

    return become


@pytest.fixture
def steer(coldmerge: Command) -> Callable[..., Any]:
    """An admin's command from afar: its answer."""

    def run(*arguments: object) -> Any:
        said = coldmerge("--remote", *arguments, "--format", "json")
        assert said.status == 0, said.err
        return said.json

    return run


def test_an_admin_steers_from_anywhere(
    live: Live, as_role: Callable[[str], None], steer: Callable[..., Any]
) -> None:
    as_role("admin")
    assert steer("invite", "st-mary")["contributor"] == "st-mary"
    live.machine("a", name="laptop")
    assert steer("revoke", "a", "--machine", "laptop", "--reason", "lost")["revoked"]
    found = {row["contributor"]: row for row in steer("contributors")}
    assert found["a"]["reason"] == "lost"
    opened = steer("round", "open", MODEL, "--min", 9)
    live.machine("b").contribute(_round(live), deltas())
    assert steer("round", "show", opened["round"])["contributions"] == 1
    assert steer("round", "list", MODEL)[0]["round"] == opened["round"]
    assert steer("model", "list")[0]["model"] == MODEL
    assert steer("release", "list", MODEL)[0]["number"] == 0
    ended = steer("round", "abandon", opened["round"], "--reason", "test")
    assert ended["state"] == "ABANDONED"


def _round(live: Live) -> Round:
    with live.store.database.read() as session:
        return session.query(Round).one()


def test_no_other_role_steers(
    live: Live, as_role: Callable[[str], None], coldmerge: Command
) -> None:
    as_role("contributor")
    assert coldmerge("--remote", "model", "list").status == 0
    refused = coldmerge("--remote", "invite", "friends")
    assert refused.status != 0
    assert "auth.wrong_role" in refused.err + refused.out


def test_what_works_on_files_says_so(
    live: Live, as_role: Callable[[str], None], coldmerge: Command, tmp_path: Path
) -> None:
    as_role("admin")
    refused = coldmerge("--remote", "release", "export", MODEL, 0, tmp_path / "out")
    assert refused.status != 0
    assert "coordinator.works_on_files" in refused.err + refused.out


def test_every_command_that_calls_the_coordinator_has_both_doors() -> None:
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        if path.name == "local.py":
            continue
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "local_channel" not in names, f"{path.name} knows the socket and no other door"
