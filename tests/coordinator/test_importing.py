"""Adding a model: what is stored, what is refused, how much memory it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from sqlalchemy import select

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import content_entries, file_digest, master_digest
from coldmerge.core.documents import ReleaseRecord, verify
from coldmerge.core.errors import CheckpointError, ColdmergeError, ConfigError, ConflictError
from coldmerge.rounds.policy import RoundTemplate
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.store import Store, releases
from coldmerge_coordinator.store.models import Blob, Model
from tests.support import write_model

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def values(seed: int, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_release_0_is_the_folder(bench: Bench, tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "hf",
        {
            "a.weight": values(1, 300, 1000),
            "b.weight": values(2, 50).astype(BFLOAT16),
            "c.weight": values(3, 50).astype(np.float16),
            "ids": np.arange(9),
        },
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("import os")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    done: list[tuple[str, int, int]] = []
    imported = add_model(
        bench.store,
        "m",
        folder,
        ["classifier.*"],
        clock=bench.clock,
        progress=lambda *step: done.append(step),
    )
    content = content_entries(Checkpoint.open(folder))
    release = bench.release(0)
    assert imported.digest == release.content_digest == content.digest
    assert (imported.tensors, imported.shared) == (4, 3)
    assert done[-1] == ("import", imported.nbytes, imported.nbytes)
    assert imported.nbytes == sum(entry.nbytes for entry in content.tensors)
    assert [file.path for file in content.files] == ["config.json", "tokenizer.json"]
    assert len(imported.notes) == 1
    assert "'classifier.*'" in imported.notes[0]
    for entry in content.tensors:
        assert file_digest(bench.store.blobs.path(entry.sha256))[0] == entry.sha256
    masters = bench.masters(release)
    np.testing.assert_array_equal(masters["b.weight"], values(2, 50).astype(BFLOAT16).astype("<f4"))
    with bench.store.database.read() as session:
        digests = releases.get_masters(session, release.master_digest)
        private = set(session.scalars(select(Blob.sha256).where(~Blob.public)))
    assert digests["a.weight"] == content.by_name["a.weight"].sha256, "fp32 is its own master"
    assert private == {digests["b.weight"], digests["c.weight"]}
    key = bench.store.signer.key.public_key()
    record = verify(releases.signed_record(release), ReleaseRecord, key)
    assert (record.number, record.previous_record, record.parents) == (0, None, ())
    assert record.master_digest == master_digest(digests)


def refused(bench: Bench, folder: Path, name: str = "m", **arguments: object) -> ColdmergeError:
    """The error of an `add_model` that must leave no model behind."""
    with pytest.raises(ColdmergeError) as caught:
        add_model(bench.store, name, folder, clock=bench.clock, **arguments)  # type: ignore[arg-type]
    with bench.store.database.read() as session:
        assert session.scalars(select(Model).where(Model.name != "there")).all() == []
    assert not list((bench.store.blobs.folder / "incoming").iterdir())
    return caught.value


def test_folders_that_are_refused(bench: Bench, tmp_path: Path) -> None:
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    (pickle / "pytorch_model.bin").write_bytes(b"\x80")
    (pickle / "config.json").write_text("{}")
    assert refused(bench, pickle).code == "checkpoint.no_safetensors"
    assert refused(bench, tmp_path / "nowhere").code == "checkpoint.no_safetensors"
    integers = write_model(tmp_path / "integers", {"ids": np.arange(3)})
    assert refused(bench, integers).code == "model.nothing_to_merge"
    fine = write_model(tmp_path / "fine", {"head.weight": values(1, 3)})
    assert refused(bench, fine, private=["head.*"]).code == "model.nothing_to_merge"
    for bad in (np.nan, np.inf):
        weights = values(1, 10)
        weights[7] = bad
        folder = write_model(tmp_path / f"with-{bad}", {"w": weights})
        error = refused(bench, folder)
        assert isinstance(error, CheckpointError)
        assert error.code == "checkpoint.not_finite"


def test_more_tensors_than_a_message_can_list_are_refused(bench: Bench, tmp_path: Path) -> None:
    one = values(1, 1)
    many = {f"layers.{i}.experts.weight": one for i in range(25_000)}
    error = refused(bench, write_model(tmp_path / "many", many))
    assert isinstance(error, CheckpointError)
    assert error.code == "model.too_many_tensors"


def test_blobs_are_for_the_coordinator_alone(bench: Bench) -> None:
    bench.add_model({"w": values(1, 3)})
    for path in bench.store.blobs.folder.glob("??/*"):
        assert path.stat().st_mode & 0o177 == 0


def test_names_and_templates_that_are_refused(bench: Bench, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "fine", {"w": values(1, 3)})
    for name in ("", "a/b", "../x", "-x", "x" * 65, "ä"):
        error = refused(bench, folder, name)
        assert isinstance(error, ConfigError)
        assert error.code == "model.bad_name"
    template = RoundTemplate.model_validate({"schedule": {"cron": "99 * * * *"}})
    assert refused(bench, folder, template=template).code == "schedule.bad_cron"
    template = RoundTemplate.model_validate({"merge": {"method": "nothing"}})
    assert refused(bench, folder, template=template).code == "merge.unknown_method"


def test_a_second_model_of_the_same_name_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.add_model({"w": values(1, 3)}, "there")
    error = refused(bench, write_model(tmp_path / "other", {"w": values(2, 3)}), "there")
    assert isinstance(error, ConflictError)
    assert error.code == "model.exists"


def test_two_models_may_share_blobs(bench: Bench) -> None:
    bench.add_model({"w": values(1, 3), "x": values(2, 3)}, "one")
    bench.add_model({"w": values(1, 3), "x": values(3, 3)}, "two")
    with bench.store.database.read() as session:
        assert len(session.scalars(select(Blob)).all()) == 5  # three tensors, two files


def test_code_in_the_configuration_is_mentioned(bench: Bench, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", {"w": values(1, 3)})
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.M"}}')
    assert "Python code" in add_model(bench.store, "m", folder, clock=bench.clock).notes[0]
    (folder / "config.json").unlink()
    assert "config.json" in add_model(bench.store, "n", folder, clock=bench.clock).notes[0]


_SMALL_DISK = """
import errno, shutil, subprocess, sys
from pathlib import Path
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", sys.argv[1]], check=True)
folder = Path(sys.argv[1])
from tests.coordinator.conftest import Bench, make_store
from tests.support import FixedClock, write_model
from coldmerge_coordinator.importing import add_model
import numpy as np
from coldmerge.core.errors import ResourceError
bench = Bench(make_store(folder / "coordinator"), FixedClock(), folder)
ones = np.ones(2_000_000, "<f4")
model = write_model(Path(sys.argv[2]), {"a": ones, "b": 2 * ones})
filler = folder / "filler"
filler.write_bytes(bytes(12_000_000))
try:
    add_model(bench.store, "m", model)
except ResourceError as error:
    print(error.code)
filler.unlink()
def fill(*_):
    if not filler.exists():
        filler.touch()
        filler.write_bytes(bytes(shutil.disk_usage(folder).free - 10_000_000))
try:
    add_model(bench.store, "m", model, progress=fill)
except ResourceError as error:
    print(error.code)
print(len(list((bench.store.blobs.folder / "incoming").iterdir())))
filler.unlink()
print(add_model(bench.store, "m", model).tensors)
"""


def in_namespace(script: str, *arguments: str) -> list[str]:
    """Run a script where it may mount a small disk; skip where that is not allowed."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("user namespaces are not allowed here")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_leaves_nothing_behind_and_the_next_try_works(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    lines = in_namespace(_SMALL_DISK, str(disk), str(tmp_path / "model"))
    assert lines == ["disk.too_small", "disk.full", "0", "2"]


_MEASURE = """
import sys, threading
from pathlib import Path
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.store import Store
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Private_"))
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.02):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
with Store.open(Path(sys.argv[1])) as store:
    add_model(store, "m", Path(sys.argv[2]))
stop.set(); watcher.join()
print(peak * 1024)
"""


def private_peak(store: Store, folder: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(store.folder), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def big_model(folder: Path, nbytes: int, tensors: int = 8) -> Path:
    block = values(1, nbytes // 4 // tensors)
    return write_model(folder, {f"layer.{i}.weight": block + i for i in range(tensors)})


def test_memory_does_not_grow_with_the_model(bench: Bench, tmp_path: Path) -> None:
    folder = big_model(tmp_path / "hf", 200 * 2**20, tensors=2)
    assert private_peak(bench.store, folder) < 150 * 2**20


@pytest.mark.slow
def test_two_gigabytes_take_less_than_400_mb(bench: Bench, tmp_path: Path) -> None:
    folder = big_model(tmp_path / "hf", 2 * 2**30)
    assert private_peak(bench.store, folder) < 400 * 2**20
