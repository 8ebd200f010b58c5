"""Backups: what was there is there again, wherever it is restored to; damage is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coldmerge.cli.app import app
from coldmerge.core.errors import ConfigError, ConflictError, IntegrityError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import models_pb2
from coldmerge_coordinator import config as settings
from coldmerge_coordinator.backup import make, restore, verify
from coldmerge_coordinator.rotation import rotate_signing
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import Store, releases, rounds
from coldmerge_coordinator.store.models import AuditLeaf, Contribution, Master, Release
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once
from tests.backends import chosen, on_postgresql
from tests.harness import MODEL, Live, MachineClient, coordinator, deltas

LATEST = models_pb2.GetReleaseRequest(model=MODEL, latest=True)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A coordinator with one round published, one open with a contribution and an upload."""
    with coordinator(tmp_path / "hub") as live:
        orgs = [live.machine(name) for name in "ab"]
        first = live.open_round()
        for seed, org in enumerate(orgs):
            org.contribute(first, deltas(seed))
        assert run_once(live.store, live.clock)
        second = live.open_round(min_contributions=2)
        orgs[0].contribute(second, deltas(5))
        orgs[1].begin(orgs[1].manifest(second, deltas(6))[0])
        yield live


def elsewhere() -> str | None:
    """Another database than the one that is still there; on SQLite it is in another folder."""
    return chosen.empty_database() if on_postgresql() else None


def dumped(folder: Path) -> dict[str, str]:
    """The rows of a backup, table by table."""
    return {path.stem: path.read_text() for path in sorted((folder / "database").iterdir())}


def test_a_restored_coordinator_is_the_same(live: Live, tmp_path: Path) -> None:
    assert make(live.store, tmp_path / "backup").contributions == 3
    restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    with Store.open(tmp_path / "again") as store:
        found = verify(store)
        assert found.problems == []
        assert (found.checked["release"], found.checked["contribution"]) == (2, 3)
        make(store, tmp_path / "backup-of-it")
    assert dumped(tmp_path / "backup-of-it") == dumped(tmp_path / "backup")


def test_a_restored_coordinator_goes_on(live: Live, tmp_path: Path) -> None:
    """With the certificate that a machine has; the upload that was open begins again."""
    org = live.machine("c")
    make(live.store, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    again = Live(tmp_path / "again")
    try:
        back = MachineClient(again, "c", org.name, org.keys, org.chain_pem)
        with again.store.database.read() as session:
            (open_round,) = rounds.active_rounds(session)
        back.contribute(open_round, deltas(7))
        assert run_once(again.store, again.clock)
        assert call(back.models.GetRelease, LATEST).number == 2
    finally:
        again.close()


def test_from_one_kind_of_database_to_another_and_back(live: Live, tmp_path: Path) -> None:
    postgresql, sqlite = chosen.empty_database(), f"sqlite:///{tmp_path / 'back.db'}"
    make(live.store, tmp_path / "backup")
    for step, url in enumerate((postgresql, sqlite)):
        restore(tmp_path / "backup", tmp_path / f"step-{step}", database_url=url)
        with Store.open(tmp_path / f"step-{step}") as store:
            assert store.database.engine.dialect.name == url.partition("+")[0].partition(":")[0]
            assert verify(store).problems == []
            make(store, tmp_path / f"backup-{step}")
        assert dumped(tmp_path / f"backup-{step}") == dumped(tmp_path / "backup")


def test_the_second_backup_copies_what_is_new(live: Live, tmp_path: Path) -> None:
    first = make(live.store, tmp_path / "backup")
    assert make(live.store, tmp_path / "backup").copied_bytes == 0
    with live.store.database.read() as session:
        (open_round,) = rounds.active_rounds(session)
    live.machine("c").contribute(open_round, deltas(7))
    assert 0 < make(live.store, tmp_path / "backup").copied_bytes < first.copied_bytes
    restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())


def test_what_was_taken_back_is_not_kept(live: Live, tmp_path: Path) -> None:
    make(live.store, tmp_path / "backup")
    admin.revoke(live.store, "a", "", "left", live.clock.now())
    assert make(live.store, tmp_path / "backup").contributions == 2
    assert len(list((tmp_path / "backup" / "contributions").iterdir())) == 2
    restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    with Store.open(tmp_path / "again") as store:
        assert verify(store).problems == []


def test_what_an_earlier_signing_key_signed_is_good(live: Live, tmp_path: Path) -> None:
    rotate_signing(live.folder)
    with Store.open(live.folder) as store:
        assert verify(store).problems == []
        make(store, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    with Store.open(tmp_path / "again") as store:
        assert verify(store).problems == []
        found = verify_release(store, MODEL, 1, tmp_path)
    assert (found.answer, found.problems) == ("exact", [])


def test_without_keys(live: Live, tmp_path: Path) -> None:
    make(live.store, tmp_path / "backup", keys=False)
    assert not any("PRIVATE" in path.read_text() for path in text_files(tmp_path / "backup"))
    restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    assert list((tmp_path / "again" / "keys").iterdir()) == []
    shutil.copytree(live.store.keys, tmp_path / "again" / "keys", dirs_exist_ok=True)
    with Store.open(tmp_path / "again") as store:
        assert verify(store).problems == []


def text_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in {".pem", ".key", ".yaml"}]


@pytest.mark.parametrize("what", ["database/round.jsonl", "ca/root.pem", "contributions", "blobs"])
def test_a_damaged_backup_is_refused(live: Live, tmp_path: Path, what: str) -> None:
    make(live.store, tmp_path / "backup")
    chosen = tmp_path / "backup" / what
    path = chosen if chosen.is_file() else next(p for p in chosen.rglob("*") if p.is_file())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError) as caught:
        restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    assert caught.value.code == "restore.damaged"
    assert not (tmp_path / "again").exists()


def test_a_backup_that_was_cut_off_is_none(live: Live, tmp_path: Path) -> None:
    make(live.store, tmp_path / "backup")
    (tmp_path / "backup" / "backup.json").unlink()
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path / "backup", tmp_path / "again", database_url=elsewhere())
    assert caught.value.code == "backup.not_one"
    assert make(live.store, tmp_path / "backup").copied_bytes == 0  # and can be finished


def test_nothing_is_written_over(live: Live, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(ConflictError, match="no backup"):
        make(live.store, tmp_path / "other")
    make(live.store, tmp_path / "backup")
    with pytest.raises(ConflictError, match="not empty"):
        restore(tmp_path / "backup", tmp_path / "other")
    with pytest.raises(ConflictError) as caught:
        restore(tmp_path / "backup", tmp_path / "again", database_url=live.store.database_url)
    assert caught.value.code == "restore.database_not_empty"
    with coordinator(tmp_path / "stranger") as stranger:
        settings.save(
            stranger.store.config.model_copy(update={"federation": "else"}), stranger.folder
        )
        with Store.open(stranger.folder) as store, pytest.raises(ConflictError) as caught:
            make(store, tmp_path / "backup")
    assert caught.value.code == "backup.other_federation"


def spoil_blob(store: Store, row: Release) -> None:
    with store.database.read() as session:
        entry = releases.get_listing(session, row.content_digest).tensors[0]
    store.blobs.path(entry.sha256).write_bytes(b"")


def spoil_record(store: Store, row: Release) -> None:
    with store.database.write() as session:
        session.get_one(Release, (row.model, row.number)).record = row.record.replace(b"1", b"2")


def spoil_payload(store: Store, _row: Release) -> None:
    with store.database.read() as session:
        name = session.query(Contribution).order_by(Contribution.id).first().payload  # type: ignore[union-attr]
    path = store.payloads.local(name)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def spoil_receipt(store: Store, _row: Release) -> None:
    with store.database.write() as session:
        for row in session.query(Contribution):
            row.receipt_signature = bytes(64)


def spoil_log(store: Store, _row: Release) -> None:
    with store.database.write() as session:
        leaf = session.query(AuditLeaf).order_by(AuditLeaf.position.desc()).first()
        leaf.document = leaf.document.replace(b"a", b"b")  # type: ignore[union-attr]


def spoil_master(store: Store, row: Release) -> None:
    with store.database.write() as session:
        master = session.get_one(Master, row.master_digest)
        master.tensors = {**master.tensors, "norm.weight": "0" * 64}


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (spoil_blob, "blob"),
        (spoil_record, "release"),
        (spoil_payload, "contribution"),
        (spoil_receipt, "contribution"),
        (spoil_master, "master"),
        (spoil_log, "audit log"),
    ],
)
def test_damage_is_found(live: Live, spoil: Callable[[Store, Release], None], kind: str) -> None:
    assert verify(live.store).problems == []
    with live.store.database.read() as session:
        latest = releases.latest_release(session, MODEL)
    spoil(live.store, latest)
    assert {problem.kind for problem in verify(live.store).problems} == {kind}


def test_commands(live: Live, tmp_path: Path) -> None:
    hub, backup, again = str(live.folder), str(tmp_path / "backup"), str(tmp_path / "again")
    runner, url = CliRunner(), elsewhere()
    into = ["--database", url] if url else []
    for command in (["backup", hub, backup], ["restore", backup, again, *into], ["verify", again]):
        done = runner.invoke(app, ["coordinator", *command, "--format", "json"])
        assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["problems"] == []
    with Store.open(Path(again)) as store, store.database.read() as session:
        spoil_blob(store, releases.latest_release(session, MODEL))
    done = runner.invoke(app, ["coordinator", "verify", again])
    assert done.exit_code == 10
    assert "bytes, not" in done.stdout
