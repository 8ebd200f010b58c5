"""Making the latest release again without somebody: the numbers, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from coldmerge.core.documents import ReleaseRecord
from coldmerge.core.errors import ConfigError, ConflictError, NotFoundError
from coldmerge.merging.outer import outer
from coldmerge.rounds.state import State
from coldmerge_coordinator.merging.works import blobs_of, job_of, merged
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import contributions, lineage, rounds, states
from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

NAMES = "abc"
NESTEROV = {"method": "nesterov", "lr": 0.5, "momentum": 0.9}
F32 = npt.NDArray[np.float32]


def random(*seed: int, scale: float = 1e-2) -> F32:
    return np.random.default_rng(seed).normal(0, scale, (30, 40)).astype(np.float32)


def tau(number: int, name: str) -> F32:
    return random(number, ord(name))


def a_round(bench: Bench, number: int, names: str = NAMES, **policy: Any) -> str:
    round_id = bench.open_round(min_contributions=len(names), **policy)
    for name in names:
        bench.contribute(round_id, name, {"body.weight": tau(number, name)})
    assert run_once(bench.store, bench.clock)
    assert bench.round(round_id).state == State.PUBLISHED
    return round_id


def history(bench: Bench, rounds_: int = 3, **policy: Any) -> list[str]:
    """Releases 1 to `rounds_`, each of a, b and c."""
    bench.add_model({"body.weight": random(0, scale=1.0), "other": random(1)})
    return [a_round(bench, number, **policy) for number in range(1, rounds_ + 1)]


def remerge(bench: Bench, *without: str, reason: str = "left") -> str:
    return admin.remerge(bench.store, "m", without, reason, bench.clock.now()).id


def digests(bench: Bench, round_id: str, name: str) -> set[str]:
    with bench.store.database.read() as session:
        found = contributions.of_round(session, round_id)
        return {item.manifest_digest for item in found if item.contributor == name}


def in_order(bench: Bench, round_id: str, names: str) -> list[str]:
    with bench.store.database.read() as session:
        found = contributions.of_round(session, round_id)
    order = sorted(found, key=lambda item: item.manifest_digest)
    return [item.contributor for item in order if item.contributor in names]


def replayed(bench: Bench, made: list[str], names: str, optimizer: dict[str, Any]) -> list[F32]:
    """The oracle: θ and velocity by numpy, in float64, rounded once a round."""
    theta, slots = random(0, scale=1.0), {}
    parameters = {key: value for key, value in optimizer.items() if key != "method"}
    step = outer(str(optimizer["method"]), parameters)
    slots = {slot: step.fresh(slot, theta.ravel()) for slot in step.slots}
    for number, round_id in enumerate(made, 1):
        total = np.zeros(theta.shape, np.float64)
        kept = in_order(bench, round_id, names)
        for name in kept:
            total += tau(number, name).astype(np.float64)
        delta, slots64 = step.step((total / len(kept)).ravel(), theta.ravel(), slots, number)
        slots = {slot: values.astype(np.float32) for slot, values in slots64.items()}
        theta = (delta + theta.ravel().astype(np.float64)).astype(np.float32).reshape(theta.shape)
    return [theta, *slots.values()]


@pytest.mark.parametrize("optimizer", [{"method": "none"}, NESTEROV], ids=["none", "nesterov"])
def test_a_contributor_is_taken_out_of_every_round_since(
    bench: Bench, optimizer: dict[str, Any]
) -> None:
    made = history(bench, merge={"outer": optimizer})
    again = remerge(bench, "b")
    assert bench.round(again).state == State.SEALED
    assert run_once(bench.store, bench.clock)
    assert (bench.round(again).state, bench.round(again).release_number) == ("PUBLISHED", 4)
    release = bench.release()
    expected = replayed(bench, made, "ac", optimizer)
    assert bench.masters(release)["body.weight"].tobytes() == expected[0].tobytes()
    record = ReleaseRecord.parse(release.record)
    assert record.flags == ("remerged", "ungated")
    assert record.parents == (bench.release(0).content_digest,)
    removed = {digest for round_id in made for digest in digests(bench, round_id, "b")}
    assert record.recipe["method"] == "remerge"
    assert record.recipe["remerge.from"] == 0
    assert record.recipe["remerge.rounds"] == ", ".join(made)
    assert record.recipe["remerge.without"] == ", ".join(sorted(removed))
    assert len(record.contributions) == 6
    assert not removed & set(record.contributions)
    if optimizer != NESTEROV:
        assert release.state_digest is None
        return
    assert record.state_digest == release.state_digest
    assert release.state_digest is not None
    with bench.store.database.read() as session:
        (slots,) = states.get_state(session, release.state_digest).slots.values()
    velocity = np.fromfile(bench.store.blobs.path(slots["body.weight"]), "<f4")
    assert velocity.tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("optimizer", [{"method": "none"}, NESTEROV], ids=["none", "nesterov"])
def test_with_nobody_left_out_the_replay_is_the_latest_release(
    bench: Bench, optimizer: dict[str, Any]
) -> None:
    history(bench, merge={"outer": optimizer})
    latest = bench.release()
    with bench.store.database.read() as session:
        whole = lineage.lineage(session, "m", 3)
        row = rounds.get(session, whole.steps[-1].round)
        row.replay = whole.to_json()
        job = job_of(bench.store, session, row, lambda: None)
        session.rollback()
    with merged(bench.store.blobs, job, bench.folder, lambda: None) as (found, overlay):
        assert found.content.digest == latest.content_digest
        assert (found.state.digest if found.state else None) == latest.state_digest
        left = {path.name for path in overlay.folder.glob("??/*")}
        assert left <= blobs_of(found)
    assert [path.name for path in bench.folder.glob("merge-*")] == []


def test_it_starts_at_the_release_before_the_first_affected_one(bench: Bench) -> None:
    made = history(bench)
    with bench.store.database.read() as session:
        target = contributions.of_round(session, made[1])[0]
    again = remerge(bench, target.id)
    replay = bench.round(again).replay or {}
    assert replay["start"] == 1
    assert [step["round"] for step in replay["steps"]] == made[1:]
    assert [len(step["inputs"]) for step in replay["steps"]] == [2, 3]


def test_a_round_of_the_removed_alone_is_skipped(bench: Bench) -> None:
    made = history(bench, 1)
    a_round(bench, 2, "b")
    made.append(a_round(bench, 3))
    again = remerge(bench, "b")
    assert run_once(bench.store, bench.clock)
    replay = bench.round(again).replay or {}
    assert [step["round"] for step in replay["steps"]] == made
    assert bench.round(again).release_number == 4


def test_when_nothing_is_left_the_release_before_comes_back(bench: Bench) -> None:
    bench.add_model({"body.weight": random(0)})
    a_round(bench, 1, "a")
    remerge(bench, "a")
    assert run_once(bench.store, bench.clock)
    assert bench.release().number == 2
    assert bench.release().content_digest == bench.release(0).content_digest


def test_rollbacks_and_earlier_re_merges_are_followed(bench: Bench) -> None:
    made = history(bench)
    admin.rollback(bench.store, "m", 1, "bad", bench.clock.now())
    fifth = a_round(bench, 5)
    remerge(bench, "a")
    assert run_once(bench.store, bench.clock)
    assert [step["round"] for step in _replay(bench, 6)["steps"]] == [made[0], fifth]
    seventh = a_round(bench, 7)
    again = remerge(bench, "b")
    replay = bench.round(again).replay or {}
    assert replay["start"] == 0
    assert [(step["round"], len(step["inputs"])) for step in replay["steps"]] == [
        (made[0], 1),
        (fifth, 1),
        (seventh, 2),
    ]
    assert run_once(bench.store, bench.clock)
    with pytest.raises(ConflictError) as caught:
        remerge(bench, "b")
    assert caught.value.code == "remerge.nothing_there"


def _replay(bench: Bench, number: int) -> dict[str, Any]:
    record = ReleaseRecord.parse(bench.release(number).record)
    return bench.round(record.round or "").replay or {}


def test_what_was_erased_must_be_left_out_too(bench: Bench) -> None:
    made = history(bench)
    with bench.store.database.write() as session:
        for item in contributions.of_round(session, made[2]):
            if item.contributor == "c":
                item.payload_erased_at = bench.clock.now()
                erased = item.id
    with pytest.raises(ConflictError) as caught:
        remerge(bench, "b")
    assert (caught.value.code, caught.value.got) == ("remerge.inputs_erased", erased)
    assert bench.round(remerge(bench, "b", erased)).state == State.SEALED


def test_nobody_and_strangers_are_refused(bench: Bench) -> None:
    history(bench, 1)
    with pytest.raises(ConfigError):
        remerge(bench)
    with pytest.raises(NotFoundError) as caught:
        remerge(bench, "a", "stranger")
    assert caught.value.code == "remerge.unknown"
    bench.open_round()
    with pytest.raises(ConflictError) as active:
        remerge(bench, "a")
    assert active.value.code == "round.already_active"


def test_the_gate_judges_it_like_any_other(bench: Bench) -> None:
    bench.add_model({"body.weight": random(0)})
    round_id = bench.open_round(min_contributions=3)
    for name in NAMES:
        bench.contribute(round_id, name, {"body.weight": tau(1, name)})
    run_once(bench.store, bench.clock)
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        row.policy = {**row.policy, "gate": {"min_evaluators": 2, "window": "1h"}}
    again = remerge(bench, "b")
    assert run_once(bench.store, bench.clock)
    assert bench.round(again).state == State.CANDIDATE
    with bench.store.database.read() as session:
        view = rounds.view(session, rounds.get(session, again))
    assert view.evaluators == ("a", "c")
