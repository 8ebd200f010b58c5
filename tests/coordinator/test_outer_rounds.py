"""Rounds with outer optimizers through the real worker: numbers, and what follows a release."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch

from coldmerge.core.dtypes import Floats32
from coldmerge.rounds.state import Resolve
from coldmerge_coordinator.store import releases, rounds, states
from coldmerge_coordinator.store.states import OuterState
from coldmerge_coordinator.worker import Worker, run_once
from tests.coordinator.conftest import merged_apart

if TYPE_CHECKING:
    from tests.coordinator.conftest import Array, Bench
    from tests.support import FixedClock

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NESTEROV = {"method": "nesterov", "lr": 0.7, "momentum": 0.9}
SIZE = 300_000  # more than one block


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(seed: int, size: int = SIZE, scale: float = 1e-2) -> Floats32:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def model(dtype: np.dtype[np.generic] | None = None) -> dict[str, Array]:
    kind = dtype or np.dtype(np.float32)
    return {name: draw(n, scale=1.0).astype(kind) for n, name in enumerate(("w", "idle", "later"))}


def play(bench: Bench, deltas: list[dict[str, Array]], outer: object = None, **policy: Any) -> str:
    """One round to its end: contributor 0, 1, … sends the deltas of its place."""
    merge = {"outer": outer} if outer else {}
    opened = bench.open_round(min_contributions=len(deltas), merge=merge, **policy)
    for number, sent in enumerate(deltas):
        bench.contribute(opened, f"org-{number}", sent)
    assert run_once(bench.store, bench.clock)
    return opened


def two(seed: int, name: str = "w") -> list[dict[str, Array]]:
    return [{name: draw(seed)}, {name: draw(seed + 1)}]


def state(bench: Bench, number: int | None = None) -> OuterState:
    digest = bench.release(number).state_digest
    assert digest is not None
    with bench.store.database.read() as session:
        found = states.get_state(session, digest)
    assert found.digest == digest
    return found


def slot(bench: Bench, kind: str, name: str = "w") -> Floats32:
    return np.fromfile(bench.store.blobs.path(state(bench).slots[kind][name]), "<f4")


def torch_rounds(
    start: Array, taus: list[list[dict[str, Array]]], make: Callable[..., torch.optim.Optimizer]
) -> torch.Tensor:
    """The same τ through torch.optim in float64, weights and slots rounded after each round."""
    weights = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64)))
    optimizer = make([weights])
    for sent in taus:
        mean = sum(each["w"].astype(np.float64) for each in sent) / len(sent)
        weights.grad = -torch.from_numpy(np.asarray(mean))
        optimizer.step()
        with torch.no_grad():
            weights.copy_(weights.float().double())
            for name, value in optimizer.state[weights].items():
                if name != "step":
                    value.copy_(value.float().double())
    return weights.detach().float()


@pytest.mark.parametrize(
    ("outer", "make"),
    [
        (NESTEROV, lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
        (
            {"method": "momentum", "lr": 0.5},
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        ),
        (
            {"method": "adam", "lr": 0.01},
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-3),
        ),
    ],
    ids=["nesterov", "momentum", "adam"],
)
@pytest.mark.parametrize("dtype", ["<f4", BFLOAT16], ids=["fp32", "bf16"])
def test_three_rounds_are_those_of_torch(
    bench: Bench, dtype: Any, outer: dict[str, Any], make: Callable[..., torch.optim.Optimizer]
) -> None:
    bench.add_model(model(np.dtype(dtype)))
    start = bench.masters(bench.release())["w"]
    taus = [two(10), two(20), two(30)]
    for sent in taus:
        play(bench, sent, outer)
    expected = torch_rounds(start, taus, make).numpy()
    found = bench.masters(bench.release())["w"]
    # An ulp of float64 may turn the rounding of a slot or a weight, here and there.
    np.testing.assert_allclose(found, expected, rtol=2**-23, atol=1e-8)
    assert np.mean(found == expected) > 0.999
    assert state(bench).steps == 3
    published = bench.published(bench.release())["w"]
    assert published.tobytes() == found.astype(np.dtype(dtype)).tobytes()


def test_the_slow_weights_are_published_and_the_fast_ones_remembered(bench: Bench) -> None:
    bench.add_model(model())
    slow = fast = bench.masters(bench.release())["w"].astype(np.float64)
    for sent in (two(10), two(20)):
        play(bench, sent, {"method": "ema", "momentum": 0.75})
        fast = fast + sum(each["w"].astype(np.float64) for each in sent) / 2
        slow = 0.75 * slow + 0.25 * fast
    np.testing.assert_allclose(bench.masters(bench.release())["w"], slow, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(slot(bench, "fast"), fast, rtol=1e-6, atol=1e-7)


def test_the_record_names_the_optimizer_and_signs_its_state(bench: Bench) -> None:
    bench.add_model(model())
    play(bench, two(10), NESTEROV)
    record = releases.get_record(bench.release())
    assert record.state_digest == state(bench).digest
    assert {key: value for key, value in record.recipe.items() if "screening" not in key} == {
        "method": "mean",
        "weights": "uniform",
        "mode": "screened",
        "outer.method": "nesterov",
        "outer.lr": 0.7,
        "outer.momentum": 0.9,
    }
    assert bench.release(0).state_digest is None


def test_what_was_moved_goes_on_and_what_never_was_stays(bench: Bench) -> None:
    bench.add_model(model())
    play(bench, two(10), NESTEROV)
    before = bench.masters(bench.release())
    velocity = slot(bench, "momentum").astype(np.float64)
    play(bench, two(20, "later"), NESTEROV)
    after = bench.masters(bench.release())
    expected = before["w"] - 0.7 * 0.9 * (0.9 * velocity)
    np.testing.assert_allclose(after["w"], expected, rtol=1e-6)
    assert after["idle"].tobytes() == bench.masters(bench.release(0))["idle"].tobytes()
    assert state(bench).names == {"w", "later"}


def test_a_rejected_candidate_is_as_if_it_never_was(
    make_bench: Callable[[str], Bench],
) -> None:
    found = []
    for name, interlude in (("with", True), ("without", False)):
        bench = make_bench(name)
        bench.add_model(model())
        play(bench, [{"w": draw(10)}], NESTEROV)
        if interlude:
            gate = {"on_timeout": "hold", "window": "1s"}
            rejected = play(bench, [{"w": draw(20)}], NESTEROV, gate=gate)
            row = bench.round(rejected)
            assert row.state == "CANDIDATE"
            assert row.candidate_state not in (None, bench.release().state_digest)
            reject(bench, rejected)
            assert (bench.round(rejected).state, bench.release().number) == ("REJECTED", 1)
        play(bench, [{"w": draw(30)}], NESTEROV)
        release = bench.release()
        found.append((release.master_digest, release.state_digest, state(bench).steps))
    assert found[0] == found[1]
    assert found[0][2] == 2


def reject(bench: Bench, round_id: str) -> None:
    from datetime import timedelta

    from coldmerge.rounds.state import Tick

    bench.clock.advance(timedelta(seconds=2))
    for event in (Tick(), Resolve(publish=False, reason="worse")):
        with bench.store.database.write() as session:
            row = rounds.get(session, round_id, lock=True)
            rounds.apply(session, row, event, bench.clock.now(), bench.store.signer)


def test_another_optimizer_starts_afresh_and_says_so(bench: Bench) -> None:
    bench.add_model(model())
    play(bench, two(10), NESTEROV)
    opened = play(bench, two(20), {"method": "adam"}, gate={"window": "1h"})
    assert bench.round(opened).reason == (
        "the outer optimizer was nesterov and is adam now: what it remembered of 1 rounds is "
        "not used"
    )
    with bench.store.database.read() as session:
        found = states.get_state(session, bench.round(opened).candidate_state or "")
    assert (found.method, found.steps, set(found.slots)) == ("adam", 1, {"adam_m", "adam_v"})


def test_other_parameters_of_the_same_optimizer_go_on(bench: Bench) -> None:
    bench.add_model(model())
    play(bench, two(10), NESTEROV)
    opened = play(bench, two(20), {**NESTEROV, "lr": 0.1}, gate={"window": "1h"})
    assert bench.round(opened).reason is None
    with bench.store.database.read() as session:
        assert states.get_state(session, bench.round(opened).candidate_state or "").steps == 2


def test_without_an_optimizer_nothing_is_remembered(bench: Bench) -> None:
    bench.add_model(model())
    play(bench, two(10), NESTEROV)
    play(bench, two(20))
    assert bench.release().state_digest is None
    play(bench, two(30), NESTEROV)
    assert state(bench).steps == 1


def test_a_rollback_restores_what_was_remembered(bench: Bench) -> None:
    bench.add_model(model())
    play(bench, two(10), NESTEROV)
    play(bench, two(20), NESTEROV)
    with bench.store.database.write() as session:
        releases.rollback(session, bench.store.signer, "m", 1, "worse", bench.clock.now())
    assert bench.release().number == 3
    assert bench.release().state_digest == bench.release(1).state_digest
    record = releases.get_record(bench.release())
    assert record.state_digest == bench.release(1).state_digest
    play(bench, two(30), NESTEROV)
    assert state(bench).steps == 2


def test_the_same_round_gives_the_same_bytes_again(
    bench: Bench, clock: FixedClock, tmp_path: Path
) -> None:
    bench.add_model(model(BFLOAT16))
    play(bench, two(10), NESTEROV)
    opened = bench.open_round(min_contributions=2, merge={"outer": NESTEROV})
    for number, sent in enumerate(two(20)):
        bench.contribute(opened, f"org-{number}", sent)
    first, second = merged_apart(bench, clock, tmp_path)
    assert first == second


class StoppingClock:
    """Asks the worker to end at its n-th reading."""

    def __init__(self, clock: FixedClock, at: int, stop: threading.Event) -> None:
        self._clock, self._at, self._stop, self._count = clock, at, stop, 0

    def now(self) -> Any:
        self._count += 1
        if self._count == self._at:
            self._stop.set()
        return self._clock.now()


@pytest.mark.parametrize("at", [6, 8, 10])
def test_interrupted_anywhere_nothing_is_left_and_the_next_starts_from_the_same_state(
    bench: Bench, at: int
) -> None:
    bench.add_model(model())
    play(bench, [{"w": draw(10)}], NESTEROV)
    opened = bench.open_round(merge={"outer": NESTEROV})
    bench.contribute(opened, "org-0", {"w": draw(20)})
    stop = threading.Event()
    assert Worker(bench.store, StoppingClock(bench.clock, at, stop), stop=stop).run_once()
    assert (bench.round(opened).state, bench.round(opened).candidate_state) == ("MERGING", None)
    assert not list((bench.store.blobs.folder / "incoming").iterdir())
    assert run_once(bench.store, bench.clock)
    assert state(bench).steps == 2
    velocity = 0.9 * -draw(10).astype(np.float64) - draw(20)
    np.testing.assert_allclose(slot(bench, "momentum"), velocity, rtol=1e-5, atol=1e-9)


def test_weights_that_do_not_fit_end_the_merge_and_not_the_release(bench: Bench) -> None:
    bench.add_model({"w": np.ones(4, np.float32)})
    opened = bench.open_round(merge={"outer": {"method": "momentum", "lr": 1e39}})
    bench.contribute(opened, "a", {"w": np.ones(4, np.float32)})
    assert run_once(bench.store, bench.clock)
    assert "task_vector.not_finite" in (bench.round(opened).reason or "")
    assert bench.release().number == 0
    assert not list((bench.store.blobs.folder / "incoming").iterdir())
