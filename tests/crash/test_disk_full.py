"""A full disk, and one that fails: contributors are told, nothing breaks, and it goes on by itself.

The coordinator's folder lies on a small file system of its own, which the test fills. Where
file systems cannot be mounted, those tests are skipped; faults injected by strace remain.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from coldmerge.core.errors import ColdmergeError, ResourceError
from coldmerge.wire.v1 import common_pb2
from coldmerge_client.session import Session
from tests.crash.checks import check_folder
from tests.crash.host import GATES, Host
from tests.crash.members import MODEL, Base, Ledger, Member, base_tensors
from tests.crash.trace import faults
from tests.support import until
from tests.zygote import Zygote

pytestmark = pytest.mark.xdist_group("crash-disk")

MiB = 2**20
NAMES = ("a", "b", "c")
LARGE, SMALL = 400_000, 2000
FULL = {"disk.full", "disk.too_small", "store.disk_full", "upload.disk_too_small"}
Round = common_pb2.Round


@dataclass
class Volume:
    """A small file system, and the ballast that fills it."""

    path: Path

    @property
    def free(self) -> int:
        """Bytes."""
        return shutil.disk_usage(self.path).free

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes."""
        with (self.path / "ballast").open("wb") as file, suppress(OSError):
            while (rest := self.free - leave) > 0:
                os.write(file.fileno(), bytes(min(rest, MiB)))

    def empty(self) -> None:
        """Give all of it back."""
        (self.path / "ballast").unlink()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    path = tmp_path / "volume"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: needs root")
    yield Volume(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@contextmanager
def federation(folder: Path, zygote: Zygote, base: Base) -> Iterator[tuple[Host, list[Member]]]:
    """A coordinator that leaves no room for emergencies, and three contributors."""
    host = Host.make(folder, zygote, base)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["limits"]["keep_free_bytes"] = 0
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    ledger = Ledger(base)
    members: list[Member] = []
    try:
        host.start()
        members += [Member(host.join(name), ledger, 1, habit=["send"]) for name in NAMES]
        host.open_round(**GATES[1])
        yield host, members
        host.stop()
        assert check_folder(folder, ledger).receipts == len(NAMES)
    finally:
        for member in members:
            member.session.close()
        host.close()


def newest(session: Session) -> common_pb2.Round:
    """The round that goes on."""
    found = session.newest_round(MODEL)
    assert found is not None
    return found


def refused(act: object, *arguments: object) -> None:
    """It meets a full disk and says so."""
    assert callable(act)
    with pytest.raises(ResourceError) as caught:
        act(*arguments)
    assert caught.value.code in FULL


def test_the_disk_is_full_at_every_stage(volume: Volume, zygote: Zygote) -> None:
    base = base_tensors(LARGE)
    with federation(volume.path / "hub", zygote, base) as (host, members):
        a, b, c = members
        first = a.prepare(newest(a.session))
        volume.fill()
        refused(a.session.begin, first.signed)
        assert a.session.release(MODEL).number == 0, "readers are served"
        volume.empty()
        begun = a.session.begin(first.signed)
        assert begun.committed_size == 0
        volume.fill()
        refused(a.write, first, begun)
        volume.empty()
        begun = a.session.begin(first.signed)
        if begun.committed_size < begun.total_size:
            assert a.write(first, begun) == begun.total_size
        volume.fill()
        refused(a.session.commit, begun.upload_id)
        volume.empty()
        assert not list((host.folder / "contributions").iterdir())
        for member in (a, b):
            assert member.step()
        third = c.prepare(newest(c.session))
        begun = c.session.begin(third.signed)
        c.write(third, begun)
        volume.fill(leave=MiB // 2)
        c.send()
        until("the merge to wait", lambda: "disk" in newest(c.session).reason)
        assert newest(c.session).state == Round.MERGING
        volume.empty()
        until("the candidate", lambda: newest(c.session).state == Round.CANDIDATE, every=0.2)
        volume.fill()
        refused(a.step)
        assert newest(c.session).evaluations == 0
        volume.empty()
        for member in members:
            assert member.step()
        assert newest(c.session).state == Round.PUBLISHED


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
FAULTS = {
    "full": ("pwrite64,fallocate", "error=ENOSPC"),
    "failing": ("fsync,fdatasync", "error=EIO"),
}


@needs_strace
@pytest.mark.parametrize("kind", FAULTS)
def test_the_disk_fails_and_is_believed(kind: str, tmp_path: Path, zygote: Zygote) -> None:
    """What could not be synced was not acknowledged; afterwards all is sent, and once."""
    base = base_tensors(SMALL)
    with federation(tmp_path / "hub", zygote, base) as (host, members):
        a, b, c = members
        assert host.api is not None
        assert host.worker is not None
        first = a.prepare(newest(a.session))
        with faults(host.api, *FAULTS[kind]), pytest.raises(ColdmergeError):
            a.session.begin(first.signed)
        begun = a.session.begin(first.signed)
        with faults(host.api, *FAULTS[kind]), pytest.raises(ColdmergeError):
            a.write(first, begun)
        begun = a.session.begin(first.signed)
        assert begun.committed_size == 0
        a.write(first, begun)
        with faults(host.api, *FAULTS[kind]), pytest.raises(ColdmergeError):
            a.session.commit(begun.upload_id)
        a.send()
        b.step()
        with faults(host.worker, *FAULTS[kind]):
            c.step()
            until("the merge", lambda: "merge" in host.log.read_text())
        until("the candidate", lambda: newest(c.session).state == Round.CANDIDATE, every=0.2)
        with faults(host.api, *FAULTS[kind]), pytest.raises(ColdmergeError):
            a.step()
        for member in members:
            assert member.step()
        assert newest(c.session).state == Round.PUBLISHED


@needs_strace
def test_a_commit_whose_sync_failed_may_turn_out_to_be_there(
    tmp_path: Path, zygote: Zygote
) -> None:
    """The log's last frames are on disk, or not, when the process dies next: both are whole."""
    base = base_tensors(SMALL)
    with federation(tmp_path / "hub", zygote, base) as (host, members):
        a = members[0]
        first = a.prepare(newest(a.session))
        begun = a.session.begin(first.signed)
        a.write(first, begun)
        assert host.api is not None
        with (
            faults(host.api, "fdatasync", "error=EIO"),
            pytest.raises(ColdmergeError),
        ):
            a.session.commit(begun.upload_id)
        host.kill()
        a.session.close()
        host.start()
        a.send()
        for member in members[1:]:
            member.step()
        until("the candidate", lambda: newest(a.session).state == Round.CANDIDATE, every=0.2)
