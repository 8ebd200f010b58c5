"""Merging a release again: exact, within tolerance, erased, or caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from coldmerge.cli.app import app
from coldmerge_coordinator.backup import verify
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import contributions, releases
from coldmerge_coordinator.verifying import Verified, verify_release
from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench


def random(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 0.1, (30, 40)).astype(np.float32)


def a_round(bench: Bench, seed: int, **merge: object) -> str:
    round_id = bench.open_round(min_contributions=3, merge=merge or {"method": "mean"})
    for place, name in enumerate("abc"):
        bench.contribute(round_id, name, {"body.weight": random(seed + place)})
    assert run_once(bench.store, bench.clock)
    return round_id


@pytest.fixture
def made(bench: Bench) -> Bench:
    """Release 0 and, of three contributions, release 1."""
    bench.add_model({"body.weight": random(0), "other": random(1).astype(np.float16)})
    a_round(bench, 10)
    return bench


def check(bench: Bench, number: int | None = None) -> Verified:
    found = verify_release(bench.store, "m", number, bench.folder)
    assert [path.name for path in bench.folder.glob("merge-*")] == []
    return found


def test_what_was_merged_here_is_exact(made: Bench) -> None:
    found = check(made)
    assert (found.answer, found.merged, found.largest) == ("exact", 3, 0.0)
    assert found.problems == []
    assert check(made, 0).answer == "exact"


@pytest.mark.parametrize("method", ["ties", "tsv_m", "iso_c", "median"])
def test_every_kind_of_method_comes_to_the_same_bytes_here(bench: Bench, method: str) -> None:
    bench.add_model({"body.weight": random(0)})
    a_round(bench, 10, method=method, outer={"method": "nesterov"})
    a_round(bench, 20, method=method, outer={"method": "nesterov"})
    assert check(bench).answer == "exact"


def test_re_merged_and_restored_releases_too(made: Bench) -> None:
    a_round(made, 20)
    admin.remerge(made.store, "m", ["b"], "left", made.clock.now())
    assert run_once(made.store, made.clock)
    found = check(made, 3)
    assert (found.answer, found.merged) == ("exact", 4)
    assert [each for each in verify(made.store).problems if each.kind == "release"] == []
    admin.rollback(made.store, "m", 1, "back", made.clock.now())
    assert check(made, 4).answer == "exact"


def test_an_erased_input_is_named(made: Bench) -> None:
    with made.store.database.read() as session:
        digest = releases.get_record(made.release()).contributions[0]
        found = contributions.by_manifest(session, digest)
    assert found is not None
    made.store.payloads.remove([found.payload])
    answer = check(made)
    assert (answer.answer, answer.erased) == ("inputs-erased", [found.id])


def _flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(raw)


def a_blob(bench: Bench) -> None:
    with bench.store.database.read() as session:
        masters = releases.get_masters(session, bench.release().master_digest)
    _flip(bench.store.blobs.path(masters["body.weight"]))


def a_payload(bench: Bench) -> None:
    (name, *_) = (found.name for found in bench.store.payloads.listed())
    _flip(bench.store.payloads.local(name))


def the_record(bench: Bench) -> None:
    with bench.store.database.write() as session:
        row = releases.get_release(session, "m", 1)
        row.record = row.record.replace(b'"number":1', b'"number":2')


def a_manifest(bench: Bench) -> None:
    with bench.store.database.write() as session:
        digest = releases.get_record(bench.release()).contributions[0]
        row = contributions.by_manifest(session, digest)
        assert row is not None
        row.manifest = row.manifest.replace(b'"examples":100', b'"examples":101')


def another_master(bench: Bench) -> None:
    """A coordinator that publishes what its inputs do not give, all signed and hashed."""
    with bench.store.database.write() as session:
        row = releases.get_release(session, "m", 1)
        content = releases.get_listing(session, row.content_digest)
        masters = releases.get_masters(session, row.master_digest)
        array = np.fromfile(bench.store.blobs.path(masters["body.weight"]), "<f4")
        array[7] += np.float32(0.01)
        sha256, _ = bench.store.blobs.put(array.tobytes())
        changed = tuple(
            entry.model_copy(update={"sha256": sha256}) if entry.name == "body.weight" else entry
            for entry in content.tensors
        )
        forged = type(content)(changed, content.files)
        masters["body.weight"] = sha256
        digests = releases.add_content(session, forged, masters, bench.clock.now())
        record = releases.get_record(row).model_copy(
            update={"content_digest": digests[0], "master_digest": digests[1]}
        )
        signed = bench.store.signer.sign(record)
        row.content_digest, row.master_digest = digests
        row.record, row.signature = signed.document, signed.signature


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (a_blob, "is damaged"),
        (a_payload, "not what its contributor signed"),
        (the_record, "is not signed by this coordinator"),
        (a_manifest, "was changed"),
        (another_master, "differs by up to 0.01"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_was_tampered_with_is_different(
    made: Bench, tamper: Callable[[Bench], None], said: str
) -> None:
    tamper(made)
    found = check(made, 1)
    assert found.answer == "different"
    assert said in " ".join(found.problems)


def test_rounding_of_another_processor_is_within_tolerance(
    made: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored release was merged with sums that differ in the last bit."""
    from coldmerge.merging.methods.mean import Mean

    real = Mean.merge

    def nudged(self: Mean, block: object, facts: object) -> object:
        return real(self, block, facts) * (1 + 1e-6)  # type: ignore[arg-type]

    monkeypatch.setattr(Mean, "merge", nudged)
    found = check(made)
    assert found.answer == "within-tolerance"
    assert 0 < found.largest < 1e-6


def test_the_command_says_it_and_exits_with_10(made: Bench) -> None:
    folder = str(made.store.folder)
    run = CliRunner().invoke(app, ["release", "verify", "m", "--dir", folder, "--format", "json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["answer"] == "exact"
    a_blob(made)
    run = CliRunner().invoke(app, ["release", "verify", "m", "--dir", folder, "--format", "json"])
    assert run.exit_code == 10
