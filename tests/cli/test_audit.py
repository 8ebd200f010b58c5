"""`coldmerge audit` and `coldmerge receipt` on a real coordinator: its folder, the net, files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from typer.testing import CliRunner

from coldmerge.cli.app import app
from coldmerge.core.documents import Signed
from coldmerge.core.errors import ColdmergeError, IntegrityError, PermissionDeniedError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import admin_pb2
from coldmerge_client import enrol
from coldmerge_client.home import Home
from coldmerge_coordinator.rotation import rotate_signing
from coldmerge_coordinator.store.models import AuditLeaf
from tests.harness import Live, coordinator, deltas


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with coordinator(tmp_path_factory.mktemp("audit") / "hub") as live:
        yield live


def join(live: Live, path: Path, name: str, role: str) -> Home:
    ttl = Duration()
    ttl.FromTimedelta(timedelta(hours=1))
    request = admin_pb2.InviteRequest(contributor=name, role=role, ttl=ttl)
    made = call(live.local_admin.Invite, request)
    home = Home(path / name)
    enrol.join(made.invitation, made.fingerprint, home, "laptop")
    return home


@pytest.fixture(scope="module")
def auditor(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return join(live, tmp_path_factory.mktemp("homes"), "watchdog", "auditor")


def run(*arguments: object) -> Any:
    """What the command prints as JSON; its error is raised as it is."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--format", "json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fails(kind: type[ColdmergeError], *arguments: object) -> ColdmergeError:
    with pytest.raises(kind) as caught:
        run(*arguments)
    return caught.value


def test_an_auditor_reads_exports_and_verifies(live: Live, auditor: Home, tmp_path: Path) -> None:
    live.token("somebody-new")
    over_the_net = run("audit", "show", "--home", auditor.path, "--limit", 500)
    assert over_the_net[0]["kind"] == "log.begun"
    mine = run("audit", "show", "--home", auditor.path, "--about", "somebody-new")
    assert [row["kind"] for row in mine] == ["contributor.invited"]
    made = run("audit", "export", tmp_path, "--home", auditor.path)
    file = Path(made["file"])
    assert file == tmp_path / "audit.jsonl"
    report = run("audit", "verify", file, "--checkpoint", auditor.path)
    assert report["entries"] == made["entries"] == len(over_the_net)
    assert run("audit", "verify", "--home", auditor.path)["root"] == report["root"]


def test_only_an_auditor_reads(live: Live, tmp_path: Path) -> None:
    plain = join(live, tmp_path, "plain", "contributor")
    error = fails(PermissionDeniedError, "audit", "show", "--home", plain.path)
    assert error.code == "auth.wrong_role"


def test_a_folder_is_verified_and_exported(live: Live, auditor: Home, tmp_path: Path) -> None:
    report = run("audit", "verify", "--dir", live.folder)
    file = tmp_path / "log.jsonl"
    run("audit", "export", file, "--dir", live.folder)
    key = auditor.membership().signing_key
    assert run("audit", "verify", file, "--key", key)["root"] == report["root"]
    assert fails(IntegrityError, "audit", "verify", file, "--key", "0" * 64).code == (
        "audit.other_key"
    )


def test_the_first_difference_is_named(live: Live, auditor: Home, tmp_path: Path) -> None:
    with live.store.database.write() as session:
        row = session.get_one(AuditLeaf, 1)
        genuine, row.document = row.document, row.document.replace(b"local admin", b"other admin")
    try:
        error = fails(IntegrityError, "audit", "verify", "--dir", live.folder)
        assert error.ids["position"] == "1"
        assert error.exit_status == 10
        file = tmp_path / "log.jsonl"
        run("audit", "export", file, "--dir", live.folder)
        assert fails(IntegrityError, "audit", "verify", file).code == "audit.wrong_root"
    finally:
        with live.store.database.write() as session:
            session.get_one(AuditLeaf, 1).document = genuine
    run("audit", "verify", "--dir", live.folder)


def test_receipts_are_checked_offline_and_against_the_log(
    live: Live, auditor: Home, tmp_path: Path
) -> None:
    org = live.machine("giver")
    receipt = org.contribute(live.open_round(min_contributions=3), deltas())
    home = join(live, tmp_path, "giver-too", "contributor")
    for folder, signed in (
        ("good", Signed(receipt.document, receipt.signature)),
        ("bad", Signed(receipt.document.replace(b"giver", b"taker"), receipt.signature)),
    ):
        (home.outbox / folder).mkdir(parents=True)
        (home.outbox / folder / "receipt.json").write_bytes(signed.document)
        (home.outbox / folder / "receipt.sig").write_bytes(signed.signature)
    good = home.outbox / "good" / "receipt.json"
    (row,) = run("receipt", "verify", good, "--home", home.path)
    assert (row["signature"], row["position"]) == ("good", None)
    file = tmp_path / "log.jsonl"
    run("audit", "export", file, "--dir", live.folder)
    (in_file,) = run("receipt", "verify", good, "--home", home.path, "--log", file)
    (online,) = run("receipt", "verify", good, "--home", home.path, "--online")
    assert in_file["position"] == online["position"]
    assert online["position"] > 0
    error = fails(ColdmergeError, "receipt", "verify", "--all", "--home", home.path)
    assert error.code == "document.bad_signature"


def test_the_log_outlives_its_signing_key(live: Live, auditor: Home, tmp_path: Path) -> None:
    run("audit", "verify", "--home", auditor.path)
    before = auditor.checkpoint()
    rotate_signing(live.folder)
    live.token("after-the-rotation")
    file = tmp_path / "log.jsonl"
    run("audit", "export", file, "--home", auditor.path)
    run("audit", "verify", file, "--checkpoint", auditor.path)
    assert before is not None
    assert auditor.checkpoint() != before
    run("audit", "export", file, "--dir", live.folder)
    run("audit", "verify", file, "--checkpoint", auditor.path)
    run("audit", "verify", "--dir", live.folder)
