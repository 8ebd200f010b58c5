"""A round that learns coefficients from slopes: real merges and rows, short evaluators."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.documents import sign
from coldmerge.core.errors import ConfigError, ManifestError
from coldmerge.rounds.coefficients import group_of
from coldmerge.rounds.state import Seal, State
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.retention import collect
from coldmerge_coordinator.service.messages import round_message
from coldmerge_coordinator.store import Store, contributions, learned, releases, rounds
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once
from tests.support import evaluation

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

Tensors = dict[str, Any]
SHAPES = {"layer.0.weight": (12, 10), "layer.1.weight": (6, 20)}
GATE = {"min_evaluators": 3, "max_vetoes": 0, "min_mean_gain": -100, "max_loss": 100}
MERGE = {"method": "task_arithmetic"}
MEMBER = Caller("a", "m1", "contributor")


def random(seed: int, scale: float = 1e-2) -> Tensors:
    draw = np.random.default_rng(seed)
    return {n: draw.normal(0, scale, s).astype(np.float32) for n, s in SHAPES.items()}


GOAL = random(99)


def updates() -> dict[str, Tensors]:
    """a knows the way in the first layer, b in the second; all else is noise."""
    first, second = SHAPES
    return {
        "a": {**random(1), first: GOAL[first]},
        "b": {**random(2), second: GOAL[second]},
        "c": random(3),
    }


def opened(bench: Bench, merge: Tensors | None = None, **learns: Any) -> str:
    rules = {"method": "gradient", "probes": 16, "initial": 0.2, **learns}
    return bench.open_round(
        min_contributions=4,
        duration="1h",
        gate=GATE,
        merge={"coefficients": rules, **(merge or MERGE)},
    )


def a_round(bench: Bench, seed: int = 5, **learns: Any) -> str:
    """Three contributions, sealed and not merged yet."""
    bench.add_model(random(0, 1.0))
    round_id = opened(bench, **learns)
    for name, deltas in updates().items():
        identifier = bench.contribute(round_id, name, deltas)
        with bench.store.database.write() as session:
            item = contributions.get(session, identifier)
            manifest = contributions.get_manifest(item)
            agreed = manifest.model_copy(update={"consents": ("learn_coefficients",)})
            item.manifest, item.manifest_digest = agreed.canonical(), agreed.digest()
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        row.probe_seed = seed
        rounds.apply(session, row, Seal(), bench.clock.now(), bench.store.signer)
    return round_id


def tensors(bench: Bench, digest: str) -> Tensors:
    """A release or candidate, in float64."""
    with bench.store.database.read() as session:
        listing = releases.get_listing(session, digest).tensors
    read = bench.store.blobs.path
    return {
        e.name: np.fromfile(read(e.sha256), "<f4").reshape(e.shape).astype(np.float64)
        for e in listing
    }


def measured(bench: Bench, round_id: str) -> tuple[float, dict[str, tuple[float, ...]]]:
    """How far the candidate at hand is from the goal, and the slopes of that, as they are asked."""
    row = bench.round(round_id)
    with bench.store.database.read() as session:
        probe = round_message(session, row, MEMBER).probe
    base, here = random(0, 1.0), tensors(bench, row.candidate_digest or "")
    off = {n: here[n] - base[n] - GOAL[n] for n in SHAPES}
    way = sum(float((GOAL[n].astype(np.float64) ** 2).sum()) for n in SHAPES)
    found: dict[str, Any] = {}
    if probe.slopes:
        start, *ends = [tensors(bench, digest) for digest in probe.directions]
        for name in SHAPES:
            group = group_of(name) if probe.slopes == "layer" else ""
            told = [2 * float((off[name] * (end[name] - start[name])).sum()) / way for end in ends]
            found[group] = tuple(np.add(found.get(group, 0.0), told).tolist())
    return sum(float((o**2).sum()) for o in off.values()) / way, found


def report(bench: Bench, round_id: str, name: str, loss: float, slopes: Tensors) -> None:
    row = bench.round(round_id)
    means = {"base_loss": 1.0, "candidate_loss": loss}
    judged = evaluation(row, name, bench.clock.now(), 1)
    judged = judged.model_copy(update={"means": means, "slopes": slopes})
    signed = sign(judged, Ed25519PrivateKey.generate())
    with bench.store.database.write() as session:
        locked = rounds.get(session, round_id, lock=True)
        rounds.record_evaluation(session, locked, signed, bench.clock.now(), bench.store.signer)


def step(bench: Bench, round_id: str) -> None:
    """Merge the candidate at hand, and let everybody report."""
    assert run_once(bench.store, bench.clock)
    loss, slopes = measured(bench, round_id)
    for name in "abc":
        report(bench, round_id, name, loss, slopes)


def learn(bench: Bench, round_id: str, *, reopened: bool = False) -> dict[str, dict[str, float]]:
    """Until the round ends: the coefficients."""
    while bench.round(round_id).active:
        step(bench, round_id)
        if reopened:  # what is not in the database is lost
            folder = bench.store.folder
            bench.store.close()
            bench.store = Store.open(folder)
    found = learned.weights_of(bench.round(round_id))
    assert found is not None
    return {name: dict(kept) for name, kept in found.of.items()}


def search(bench: Bench, round_id: str) -> Tensors:
    return bench.round(round_id).coefficients or {}


def verified(bench: Bench, number: int) -> tuple[str, list[str]]:
    found = verify_release(bench.store, "m", number, bench.folder)
    return found.answer, found.problems


def test_each_layer_is_found_and_the_release_verifies(bench: Bench) -> None:
    round_id = a_round(bench, granularity="layer", probes=24)
    found = learn(bench, round_id)
    assert (bench.round(round_id).state, bench.release().number) == (State.PUBLISHED, 1)
    right = {("a", "layer.0"), ("b", "layer.1")}
    for name, kept in found.items():
        for layer, each in kept.items():
            assert (each > 0.7) if (name, layer) in right else (each < 0.25), (name, layer, each)
    probes = search(bench, round_id)["probes"]
    told = [probe["slopes"] is not None for probe in probes]
    assert told == [False] * 4 + [True] * (len(told) - 4)
    assert len(told) > 6
    assert verified(bench, 1) == ("exact", [])


def test_a_crash_between_any_two_probes_changes_nothing(make_bench: Any) -> None:
    one, other = make_bench("one"), make_bench("other")
    rounds_ = [a_round(each, probes=8) for each in (one, other)]
    found = learn(one, rounds_[0])
    assert learn(other, rounds_[1], reopened=True) == found
    kept = [
        [(probe["point"], probe["slopes"]) for probe in search(bench, round_id)["probes"]]
        for bench, round_id in zip((one, other), rounds_, strict=True)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 8


def test_other_slopes_than_the_signed_ones_are_found(bench: Bench) -> None:
    round_id = a_round(bench, probes=8)
    learn(bench, round_id)
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id)
        forged = copy.deepcopy(row.coefficients or {})
        forged["probes"][5]["slopes"][0] += 0.5
        forged["probes"][6]["candidate"] = "0" * 64
        row.coefficients = forged
    answer, problems = verified(bench, 1)
    assert answer == "different"
    assert "probe 6 has other slopes than its signed evaluations say" in problems
    assert "probe 7 was of another candidate than was evaluated" in problems


def test_what_slopes_are_told_along_stays_until_the_search_ends(bench: Bench) -> None:
    round_id = a_round(bench, probes=8)
    for _ in range(6):
        step(bench, round_id)
    digests = [probe["candidate"] for probe in search(bench, round_id)["probes"]][:4]
    bench.clock.time += bench.store.config.retention.candidates * 2
    assert [found.count for found in collect(bench.store, bench.clock.now()) if found.count]
    with bench.store.database.read() as session:
        told = round_message(session, bench.round(round_id), MEMBER).probe
        assert (list(told.directions), told.slopes) == (digests, "task")
        assert all(learned.is_direction(session, "m", digest) for digest in digests)
    assert all(np.isfinite(x).all() for d in digests for x in tensors(bench, d).values())
    learn(bench, round_id)
    with bench.store.database.read() as session:
        assert not learned.is_direction(session, "m", digests[1])


def test_slopes_of_something_else_are_refused_and_none_are_done_without(bench: Bench) -> None:
    round_id = a_round(bench)
    assert run_once(bench.store, bench.clock)
    with pytest.raises(ManifestError, match=r"evaluation\.other_slopes") as caught:
        report(bench, round_id, "a", 1.0, {"": (1.0, 2.0, 3.0)})
    assert caught.value.expected == "none", "the first candidate is what slopes are told along"
    for name in "abc":
        report(bench, round_id, name, *measured(bench, round_id))
    for _ in range(3):
        step(bench, round_id)
    assert run_once(bench.store, bench.clock)
    with pytest.raises(ManifestError, match=r"evaluation\.other_slopes") as caught:
        report(bench, round_id, "a", 1.0, {"": (1.0, 2.0)})
    assert caught.value.got == "2 of all"
    with pytest.raises(ManifestError, match=r"evaluation\.other_slopes"):
        report(bench, round_id, "a", 1.0, {"layer.0": (1.0, 2.0, 3.0)})
    with pytest.raises(ManifestError, match=r"document\.malformed"):
        report(bench, round_id, "a", 1.0, {"": (1e7, 2.0, 3.0)})
    report(bench, round_id, "a", 0.9, measured(bench, round_id)[1])
    report(bench, round_id, "b", 0.9, {})
    report(bench, round_id, "c", 0.9, {})
    assert search(bench, round_id)["probes"][4]["slopes"] is not None
    assert run_once(bench.store, bench.clock)
    for name in "abc":
        report(bench, round_id, name, 0.9, {})
    row = bench.round(round_id)
    assert (row.coefficients or {})["done"]
    assert "only 0 of at least 1 evaluators reported slopes of probe 6" in str(row.reason)


@pytest.mark.parametrize(
    ("merge", "code"),
    [
        ({"method": "mean"}, "policy.coefficients_not_linear"),
        ({"method": "ties"}, "policy.coefficients_not_linear"),
        (
            {"method": "task_arithmetic", "parameters": {"normalize": True}},
            "policy.coefficients_not_linear",
        ),
        ({**MERGE, "outer": {"method": "adam"}}, "policy.coefficients_not_linear"),
    ],
)
def test_what_is_not_linear_is_refused(bench: Bench, merge: Tensors, code: str) -> None:
    bench.add_model(random(0, 1.0))
    with pytest.raises(ConfigError) as caught:
        opened(bench, merge)
    assert caught.value.code == code


def test_a_model_that_is_published_rounded_is_refused(bench: Bench) -> None:
    bench.add_model({"layer.0.weight": np.ones((4, 4), ml_dtypes.bfloat16)})
    with pytest.raises(ConfigError) as caught:
        opened(bench)
    assert caught.value.code == "policy.coefficients_rounded"
