"""Merging sealed rounds: the numbers, the leases, and every way to be interrupted."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import structlog
import torch
from sqlalchemy import func, select

from coldmerge.core.documents import ReleaseRecord, verify
from coldmerge.rounds.policy import MergePolicy
from coldmerge.rounds.state import Abandon
from coldmerge_coordinator import worker as worker_module
from coldmerge_coordinator.store import contributions, leases, releases, rounds
from coldmerge_coordinator.store.bucket import our_error
from coldmerge_coordinator.store.models import AuditLeaf, Master, Notice
from coldmerge_coordinator.worker import Worker, run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Array, Bench
    from tests.support import FixedClock

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 300, 1000  # more than one block


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(
    seed: int, *shape: int, scale: float = 1.0
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def model(dtype: np.dtype[np.generic] = np.dtype(np.float32)) -> dict[str, Array]:  # noqa: B008
    return {
        "body.weight": random(1, ROWS, COLUMNS).astype(dtype),
        "body.bias": random(2, COLUMNS).astype(dtype),
        "frozen.weight": random(3, 7, 5).astype(dtype),
        "ids": np.arange(12, dtype=np.int64),
        "scalar": np.array(0.5, dtype),
        "empty": np.zeros((0, 3), dtype),
    }


def mean_by_torch(
    bench: Bench, round_id: str, base: Array, taus: Mapping[str, Array], weights: dict[str, float]
) -> torch.Tensor:
    """base + Σwτ/Σw in float64, in the order of the sealed manifests, rounded once."""
    with bench.store.database.read() as session:
        row = rounds.get(session, round_id)
        names = [c.contributor for c in contributions.sealed(session, row)]
    total = torch.zeros(base.size, dtype=torch.float64)
    for name in names:
        total += weights[name] * torch.from_numpy(taus[name].astype(np.float64).ravel())
    total /= sum(weights[name] for name in names)
    return (torch.from_numpy(base.astype(np.float64).ravel()) + total).to(torch.float32)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bfloat16"])
@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_master_is_base_plus_mean_rounded_once(bench: Bench, dtype: str, weights: str) -> None:
    kind = np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16
    bench.add_model(model(kind))
    before = bench.masters(bench.release())
    round_id = bench.open_round(min_contributions=3, merge={"method": "mean", "weights": weights})
    taus, counted = {}, {}
    for number, name in enumerate(("a", "b", "c"), 1):
        taus[name] = random(10 + number, ROWS, COLUMNS, scale=1e-2)
        counted[name] = 1.0 if weights == "uniform" else 100.0 * number
        bench.contribute(round_id, name, {"body.weight": taus[name]}, examples=100 * number)
    assert run_once(bench.store, bench.clock)
    assert bench.round(round_id).state == "PUBLISHED"
    release = bench.release()
    master, published = bench.masters(release), bench.published(release)
    expected = mean_by_torch(bench, round_id, before["body.weight"], taus, counted)
    assert master["body.weight"].tobytes() == expected.numpy().tobytes()
    assert published["body.weight"].tobytes() == master["body.weight"].astype(kind).tobytes()
    assert not run_once(bench.store, bench.clock)


def test_untouched_tensors_keep_their_blobs_and_fp32_needs_one(bench: Bench) -> None:
    bench.add_model(model())
    round_id = bench.open_round()
    bench.contribute(round_id, "a", {"body.bias": random(5, COLUMNS)})
    run_once(bench.store, bench.clock)
    with bench.store.database.read() as session:
        old, new = (releases.get_release(session, "m", number) for number in (0, 1))
        before = releases.get_listing(session, old.content_digest)
        after = releases.get_listing(session, new.content_digest)
        masters = releases.get_masters(session, new.master_digest)
    changed = [a.name for a, b in zip(before.tensors, after.tensors, strict=True) if a != b]
    assert changed == ["body.bias"]
    assert all(after.by_name[name].sha256 == sha256 for name, sha256 in masters.items())
    assert "ids" not in masters
    assert after.files == before.files


def test_record_names_parents_inputs_and_recipe(bench: Bench) -> None:
    bench.add_model(model())
    round_id = bench.open_round(min_contributions=2)
    bench.contribute(round_id, "a", {"body.bias": random(5, COLUMNS)})
    bench.contribute(round_id, "b", {"body.bias": random(6, COLUMNS)})
    run_once(bench.store, bench.clock)
    release = bench.release()
    record = verify(
        releases.signed_record(release), ReleaseRecord, bench.store.signer.key.public_key()
    )
    assert record.parents == (bench.release(0).content_digest,)
    assert record.contributions == tuple(sorted(bench.round(round_id).sealed_inputs or ()))
    assert record.recipe == {
        "method": "mean",
        "weights": "uniform",
        "mode": "screened",
        "screening.clip": 2.0,
        "screening.reference_norm": pytest.approx(np.sqrt(COLUMNS), rel=0.1),
    }
    assert record.master_digest == release.master_digest


def test_lora_is_expanded_into_the_master(bench: Bench) -> None:
    bench.add_model(model())
    base = bench.masters(bench.release())["body.weight"]
    round_id = bench.open_round()
    a, b = random(7, 4, COLUMNS), random(8, ROWS, 4)
    bench.contribute(
        round_id,
        "a",
        {"body.weight.lora_A": a, "body.weight.lora_B": b},
        scaling={"body.weight": 0.25},
    )
    run_once(bench.store, bench.clock)
    delta = (0.25 * (b.astype(np.float64) @ a.astype(np.float64))).astype(np.float32).ravel()
    expected = (base.astype(np.float64) + delta).astype(np.float32)
    got = bench.masters(bench.release())["body.weight"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_twenty_rounds_of_tiny_bf16_updates_do_not_stall(bench: Bench) -> None:
    """Each update is far below half a step of bf16 at 1.0 (2⁻⁹): alone it would be lost."""
    start = np.ones(1000, BFLOAT16)
    step = np.float32(2.0**-12)
    bench.add_model({"w": start})
    shown = []
    for number in range(20):
        round_id = bench.open_round(min_contributions=2)
        bench.contribute(round_id, "a", {"w": np.full(1000, step)})
        bench.contribute(round_id, "b", {"w": np.full(1000, step)})
        assert run_once(bench.store, bench.clock)
        release = bench.release()
        assert release.number == number + 1
        shown.append(float(bench.published(release)["w"][0]))
    assert (start + step.astype(BFLOAT16) == start).all(), "bf16 alone stands still"
    np.testing.assert_array_equal(bench.masters(bench.release())["w"], 1 + 20 * step)
    assert shown[-1] == float(np.float32(1 + 20 * step).astype(BFLOAT16)) > 1
    assert shown == sorted(shown)
    with bench.store.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Master)) == 21


def test_a_corrupt_contribution_fails_three_times_and_ends_the_round(bench: Bench) -> None:
    bench.add_model(model())
    round_id = bench.open_round(webhook="http://127.0.0.1:9/hook")
    contribution = bench.contribute(round_id, "a", {"body.bias": random(5, COLUMNS)})
    path = bench.store.payloads.local(f"{contribution}.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    worker = Worker(bench.store, bench.clock)
    for attempt in (1, 2, 3):
        assert worker.run_once()
        assert bench.round(round_id).merge_attempts == attempt
        assert not worker.run_once(), "it waits a while between attempts"
        bench.clock.advance(worker_module.RETRY)
    row = bench.round(round_id)
    assert row.state == "ABANDONED"
    assert "merge.input_corrupt" in (row.reason or "")
    assert bench.release().number == 0
    with bench.store.database.read() as session:
        kinds = [
            n.body["kind"] for n in session.scalars(select(Notice).order_by(Notice.created_at))
        ]
    assert sorted(kinds) == ["round.abandoned", "round.stuck", "round.stuck"]


@pytest.mark.parametrize(
    "error",
    [
        our_error("blobs/ab/abc", "PermissionDeniedError", "<Code>AccessDenied</Code>"),
        our_error("blobs/ab/abc", "GenericError", "<Code>NoSuchBucket</Code>"),
        our_error("blobs/ab/abc", "GenericError", "connection refused"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
    ids=["denied", "no-bucket", "away", "stale", "descriptors"],
)
def test_an_outage_that_passes_costs_the_round_no_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bench.add_model(model())
    round_id = bench.open_round()
    bench.contribute(round_id, "a", {"body.bias": random(5, COLUMNS)})
    worker = Worker(bench.store, bench.clock)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "merge_round", fail)
        for _ in range(4):
            assert worker.run_once()
            assert not worker.run_once(), "it waits a while between attempts"
            bench.clock.advance(worker_module.RETRY_FULL)
    assert (bench.round(round_id).state, bench.round(round_id).merge_attempts) == ("MERGING", 0)
    assert worker.run_once()
    assert bench.round(round_id).state == "PUBLISHED"


PRIVATE = "/srv/hub/blobs/ab/secret-name"


@pytest.mark.parametrize(
    ("error", "code", "event"),
    [
        (KeyError(PRIVATE), "[merge.unexpected]", "merge.failed"),
        (OSError(errno.EIO, "Input/output error", PRIVATE), "[merge.unexpected]", "merge.failed"),
        (OSError(errno.EMFILE, "Too many open files", PRIVATE), "the merge waits", "merge.waits"),
    ],
    ids=["bug", "disk", "descriptors"],
)
def test_participants_do_not_read_what_an_unexpected_error_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, event: str
) -> None:
    bench.add_model(model())
    round_id = bench.open_round(webhook="http://127.0.0.1:9/hook")
    bench.contribute(round_id, "a", {"body.bias": random(5, COLUMNS)})

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker_module, "merge_round", fail)
    with structlog.testing.capture_logs() as lines:
        assert run_once(bench.store, bench.clock)
    reason = bench.round(round_id).reason or ""
    assert code in reason
    assert "see the coordinator's log" in reason
    with bench.store.database.read() as session:
        entries = session.scalars(select(AuditLeaf.document)).all()
        notices = session.scalars(select(Notice.body)).all()
    said = reason + repr(entries) + repr(notices)
    assert "secret" not in said
    assert type(error).__name__ not in said
    (line,) = [line for line in lines if line["event"] == event]
    assert PRIVATE in line["error"]


def test_a_missing_contribution_file_is_a_failed_merge(bench: Bench) -> None:
    bench.add_model(model())
    round_id = bench.open_round()
    contribution = bench.contribute(round_id, "a", {"body.bias": random(5, COLUMNS)})
    bench.store.payloads.remove([f"{contribution}.safetensors"])
    assert run_once(bench.store, bench.clock)
    row = bench.round(round_id)
    assert (row.state, row.merge_attempts) == ("SEALED", 1)


def test_a_result_beyond_the_published_type_is_a_failed_merge(bench: Bench) -> None:
    bench.add_model({"w": np.full(4, 60000, np.float16)})
    round_id = bench.open_round()
    bench.contribute(round_id, "a", {"w": np.full(4, 10000, np.float32)})
    assert run_once(bench.store, bench.clock)
    assert "checkpoint.overflow" in (bench.round(round_id).reason or "")
    assert not list((bench.store.blobs.folder / "incoming").iterdir())


class EventfulClock:
    """Does something at its n-th reading: in the middle of a merge."""

    def __init__(self, clock: FixedClock, at: int, event: Callable[[], None]) -> None:
        self._clock, self._at, self._event, self._count = clock, at, event, 0

    def now(self) -> datetime:
        self._count += 1
        if self._count == self._at:
            self._event()
        return self._clock.now()


def sealed_round(bench: Bench) -> str:
    bench.add_model(model())
    round_id = bench.open_round()
    bench.contribute(round_id, "a", {"body.weight": random(5, ROWS, COLUMNS)})
    return round_id


def test_only_one_worker_takes_a_round(bench: Bench) -> None:
    round_id = sealed_round(bench)
    with bench.store.database.write() as session:
        leases.acquire(
            session, f"merge:{round_id}", "other", bench.clock.now(), timedelta(seconds=30)
        )
    assert not run_once(bench.store, bench.clock)
    bench.clock.advance(timedelta(seconds=31))
    assert run_once(bench.store, bench.clock)
    assert bench.round(round_id).state == "PUBLISHED"


@pytest.mark.parametrize("at", [5, 9, 16])  # verifying, merging, committing
def test_a_worker_paused_past_its_lease_cannot_write_over_its_successor(
    bench: Bench, at: int
) -> None:
    round_id = sealed_round(bench)

    def takeover() -> None:
        bench.clock.advance(timedelta(minutes=5))
        assert Worker(bench.store, bench.clock, holder="successor").run_once()

    slow = Worker(bench.store, EventfulClock(bench.clock, at, takeover), holder="slow")
    assert slow.run_once()
    assert bench.release().number == 1
    assert bench.round(round_id).state == "PUBLISHED"
    assert not slow.run_once()


def test_a_round_abandoned_while_it_merges_stays_abandoned(bench: Bench) -> None:
    round_id = sealed_round(bench)

    def abandon() -> None:
        bench.clock.advance(worker_module.BEAT)
        with bench.store.database.write() as session:
            row = rounds.get(session, round_id, lock=True)
            rounds.apply(session, row, Abandon("no"), bench.clock.now(), bench.store.signer)

    assert Worker(bench.store, EventfulClock(bench.clock, 5, abandon)).run_once()
    row = bench.round(round_id)
    assert (row.state, row.reason, row.merge_attempts) == ("ABANDONED", "no", 0)
    assert bench.release().number == 0


def test_a_stopped_worker_leaves_the_round_to_the_next_at_once(bench: Bench) -> None:
    round_id = sealed_round(bench)
    stop = threading.Event()
    clock = EventfulClock(bench.clock, 5, stop.set)
    assert Worker(bench.store, clock, holder="first", stop=stop).run_once()
    row = bench.round(round_id)
    assert (row.state, row.merge_attempts) == ("MERGING", 0)
    assert Worker(bench.store, bench.clock, holder="second").run_once()
    assert bench.round(round_id).state == "PUBLISHED"


def test_an_unknown_method_in_an_old_round_fails_clearly(bench: Bench) -> None:
    round_id = sealed_round(bench)
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        row.policy = {**row.policy, "merge": MergePolicy(method="gone").model_dump()}
    assert run_once(bench.store, bench.clock)
    assert "merge.unknown_method" in (bench.round(round_id).reason or "")
