"""A round that learns its coefficients: real merges, real rows, evaluators of a few lines."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import inspect, select

from coldmerge.core.documents import ReleaseRecord, sign
from coldmerge.core.errors import ConfigError, ManifestError
from coldmerge.rounds.state import Seal, State
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.service.messages import admitted_message, round_message
from coldmerge_coordinator.store import Store, contributions, learned, releases, rounds
from coldmerge_coordinator.store.database import downgrade, migrate
from coldmerge_coordinator.store.models import AuditLeaf
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once
from tests.support import evaluation

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

Floats = npt.NDArray[np.float32]
SHAPES = {"layer.0.weight": (12, 10), "layer.1.weight": (6, 20)}
GATE = {"min_evaluators": 3, "max_vetoes": 0, "min_mean_gain": -100, "max_loss": 100}
MEMBER = Caller("a", "m1", "contributor")


def random(seed: int, scale: float = 1e-2) -> dict[str, Floats]:
    draw = np.random.default_rng(seed)
    return {n: draw.normal(0, scale, s).astype(np.float32) for n, s in SHAPES.items()}


def goal() -> dict[str, Floats]:
    """Where the model should go, seen from its base."""
    return random(99)


def updates() -> dict[str, dict[str, Floats]]:
    """a and b know the way, each with mistakes of its own; c sends noise as long as theirs."""
    return {
        "a": {n: goal()[n] + random(1, 3e-3)[n] for n in SHAPES},
        "b": {n: goal()[n] + random(2, 3e-3)[n] for n in SHAPES},
        "c": random(3),
    }


def a_round(
    bench: Bench, *, agreed: str = "abc", merge: dict[str, Any] | None = None, **learns: Any
) -> str:
    """Three contributions, sealed and not merged yet."""
    bench.add_model(random(0, 1.0))
    rules = {"objective": "loss", "probes": 12, **learns}
    round_id = bench.open_round(
        min_contributions=4,
        duration="1h",
        gate=GATE,
        merge={"coefficients": rules, **(merge or {})},
    )
    for name, deltas in updates().items():
        identifier = bench.contribute(round_id, name, deltas)
        if name in agreed:
            agree(bench, identifier)
    seal(bench, round_id)
    return round_id


def agree(bench: Bench, identifier: str) -> None:
    with bench.store.database.write() as session:
        item = contributions.get(session, identifier)
        manifest = contributions.get_manifest(item)
        agreed = manifest.model_copy(update={"consents": ("learn_coefficients",)})
        item.manifest, item.manifest_digest = agreed.canonical(), agreed.digest()


def seal(bench: Bench, round_id: str) -> None:
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        rounds.apply(session, row, Seal(), bench.clock.now(), bench.store.signer)


def loss_of(bench: Bench, round_id: str) -> float:
    """How far the candidate at hand is from the goal, in the length of the way."""
    row = bench.round(round_id)
    with bench.store.database.read() as session:
        digests = releases.get_masters(session, row.candidate_master or "")
    base, off, way = random(0, 1.0), 0.0, 0.0
    for name, sha256 in digests.items():
        theta = np.fromfile(bench.store.blobs.path(sha256), "<f4").reshape(SHAPES[name])
        off += float(np.sum((theta - base[name] - goal()[name]) ** 2))
        way += float(np.sum(goal()[name] ** 2))
    return off / way


def report(bench: Bench, round_id: str, name: str, **means: float) -> None:
    row = bench.round(round_id)
    judged = evaluation(row, name, bench.clock.now(), 1)
    judged = judged.model_copy(update={"means": means})
    signed = sign(judged, Ed25519PrivateKey.generate())
    with bench.store.database.write() as session:
        locked = rounds.get(session, round_id, lock=True)
        now, signer = bench.clock.now(), bench.store.signer
        rounds.record_evaluation(session, locked, signed, now, signer)


def step(bench: Bench, round_id: str) -> None:
    """Merge the candidate at hand, and let everybody report."""
    assert run_once(bench.store, bench.clock)
    loss = loss_of(bench, round_id)
    for name in "abc":
        report(bench, round_id, name, base_loss=1.0, candidate_loss=loss)


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


def verified(bench: Bench, number: int) -> tuple[str, list[str]]:
    found = verify_release(bench.store, "m", number, bench.folder)
    return found.answer, found.problems


@pytest.mark.parametrize("method", ["quadratic", "spsa", "fork"])
def test_noise_gets_a_low_coefficient_and_the_release_verifies(bench: Bench, method: str) -> None:
    round_id = a_round(bench, method=method, probes=20)
    found = learn(bench, round_id)
    row = bench.round(round_id)
    assert (row.state, row.release_number) == (State.PUBLISHED, 1)
    low, high = found["c"][""], min(found["a"][""], found["b"][""])
    assert low < 0.5 * high
    taus, weights = updates(), {name: max(kept[""], 1e-6) for name, kept in found.items()}
    total = sum(weights.values())
    for name in SHAPES:
        mean = sum(weights[one] * taus[one][name].astype(np.float64) for one in taus)
        want = random(0, 1.0)[name] + mean / total
        got = bench.masters(bench.release())[name].reshape(SHAPES[name])
        np.testing.assert_allclose(got, want, atol=2e-7)
    assert verified(bench, 1) == ("exact", [])


def test_layers_have_coefficients_of_their_own(bench: Bench) -> None:
    """Where c's update is noise in one layer, and right in the other."""
    merge = {"method": "task_arithmetic"}
    round_id = a_round(bench, merge=merge, granularity="layer", probes=40)
    found = learn(bench, round_id)
    assert {group for kept in found.values() for group in kept} == {"layer.0", "layer.1"}
    assert all(kept < 0.15 for kept in found["c"].values())
    assert all(kept > 0.3 for name in "ab" for kept in found[name].values())
    recipe = ReleaseRecord.parse(bench.release().record).recipe
    assert len([key for key in recipe if key.startswith("coefficient.")]) == 6
    assert verified(bench, 1) == ("exact", [])


def test_a_crash_between_any_two_probes_changes_nothing(make_bench: Any) -> None:
    one, other = make_bench("one"), make_bench("other")
    rounds_ = [a_round(each) for each in (one, other)]
    for bench, round_id in zip((one, other), rounds_, strict=True):
        with bench.store.database.write() as session:
            rounds.get(session, round_id).probe_seed = 5
    found = learn(one, rounds_[0])
    assert learn(other, rounds_[1], reopened=True) == found
    points = [
        [probe["point"] for probe in (bench.round(round_id).coefficients or {})["probes"]]
        for bench, round_id in zip((one, other), rounds_, strict=True)
    ]
    assert points[0] == points[1]


def test_a_worker_that_dies_in_a_probe_merges_it_again(bench: Bench) -> None:
    round_id = a_round(bench)
    step(bench, round_id)
    before = bench.round(round_id)
    with bench.store.database.write() as session:  # it had begun
        rounds.get(session, round_id).state = State.MERGING
    assert run_once(bench.store, bench.clock)
    after = bench.round(round_id)
    assert (after.state, after.trial) == (State.CANDIDATE, 1)
    assert (after.coefficients or {})["point"] == (before.coefficients or {})["point"]


def test_who_did_not_agree_shares_a_coefficient(bench: Bench) -> None:
    round_id = a_round(bench, agreed="c")
    found = learn(bench, round_id)
    assert found["a"] == found["b"]
    assert found["c"][""] < found["a"][""]


def test_where_nobody_agreed_and_all_share_there_is_nothing_to_learn(bench: Bench) -> None:
    round_id = a_round(bench, agreed="")
    assert run_once(bench.store, bench.clock)
    row = bench.round(round_id)
    assert (row.state, row.trial) == (State.CANDIDATE, 0)
    assert (row.coefficients or {})["done"]
    for name in "abc":
        report(bench, round_id, name)
    assert bench.round(round_id).state == State.PUBLISHED
    mean = sum(updates()[one]["layer.0.weight"] for one in "abc") / 3
    got = bench.masters(bench.release())["layer.0.weight"].reshape(SHAPES["layer.0.weight"])
    np.testing.assert_allclose(got, random(0, 1.0)["layer.0.weight"] + mean, atol=2e-7)
    assert verified(bench, 1) == ("exact", [])


def test_a_report_without_the_number_is_refused(bench: Bench) -> None:
    round_id = a_round(bench)
    assert run_once(bench.store, bench.clock)
    with pytest.raises(ManifestError, match=r"evaluation\.no_number") as caught:
        report(bench, round_id, "a", base_entropy=1.0, candidate_entropy=1.0)
    assert caught.value.got == "base_entropy, candidate_entropy"
    with pytest.raises(ManifestError, match=r"evaluation\.no_number"):
        report(bench, round_id, "a")
    with pytest.raises(ManifestError, match=r"document\.malformed"):
        report(bench, round_id, "a", base_loss=1.0, candidate_loss=1e5)
    with pytest.raises(ManifestError, match=r"document\.malformed"):
        report(bench, round_id, "a", base_loss=1.0, candidate_loss=-0.1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report(bench, round_id, "a", base_loss=1.0, candidate_loss=float("nan"))
    assert bench.round(round_id).trial == 0


def test_members_see_the_question_and_the_admin_the_answers(bench: Bench) -> None:
    round_id = a_round(bench)
    step(bench, round_id)
    step(bench, round_id)
    row = bench.round(round_id)
    with bench.store.database.read() as session:
        told = round_message(session, row, MEMBER)
        seen = round_message(session, row, Caller("root", "m1", "admin"))
        item = contributions.of_round(session, round_id)[0]
    assert (told.probe.number, told.probe.most, told.probe.objective) == (3, 12, "loss")
    assert not told.probes
    assert [(one.number, one.evaluators) for one in seen.probes] == [(1, 3), (2, 3)]
    assert seen.probes[0].value == 0
    assert len(seen.probes[0].point) == 3
    message = admitted_message(item, 1.0, {"": 0.25})
    assert dict(message.coefficients) == {"": 0.25}
    learn(bench, round_id)
    with bench.store.database.read() as session:
        ended = round_message(session, bench.round(round_id), MEMBER)
    assert not ended.HasField("probe")


def test_the_record_names_the_coefficients_and_a_forged_one_is_found(bench: Bench) -> None:
    round_id = a_round(bench)
    found = learn(bench, round_id)
    with bench.store.database.write() as session:
        row = releases.get_release(session, "m", 1)
        record = releases.get_record(row)
        inputs = contributions.of_round(session, round_id)
        named = {i.contributor: record.recipe[f"coefficient.{i.manifest_digest}"] for i in inputs}
        assert named == {name: kept[""] for name, kept in found.items()}
        assert record.recipe["coefficients.method"] == "quadratic"
        measured = (bench.round(round_id).coefficients or {})["probes"]
        assert record.recipe["coefficients.measured"] == len(measured)
        key = f"coefficient.{inputs[0].manifest_digest}"
        forged = record.model_copy(update={"recipe": {**record.recipe, key: 0.123}})
        signed = bench.store.signer.sign(forged)
        row.record, row.signature = signed.document, signed.signature
    answer, problems = verified(bench, 1)
    assert answer == "different"
    assert "the record names other coefficients than the round learned" in problems


def test_other_numbers_than_the_signed_ones_are_found(bench: Bench) -> None:
    round_id = a_round(bench)
    learn(bench, round_id)
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id)
        search = copy.deepcopy(row.coefficients or {})
        search["probes"][2]["reports"]["a"] = -0.9
        row.coefficients = search
    answer, problems = verified(bench, 1)
    assert answer == "different"
    assert "probe 3 was not measured as its signed evaluations say" in problems
    assert "the coefficients do not follow from what was reported of the probes" in problems


def test_the_audit_log_has_every_probe(bench: Bench) -> None:
    round_id = a_round(bench)
    learn(bench, round_id)
    with bench.store.database.read() as session:
        leaves = list(session.scalars(select(AuditLeaf).where(AuditLeaf.kind == "round.probed")))
        kinds = [one.kind for one in session.scalars(select(AuditLeaf))]
    measured = (bench.round(round_id).coefficients or {})["probes"]
    assert len(leaves) == len(measured)
    assert len({json.loads(leaf.document)["detail"]["search"] for leaf in leaves}) == len(measured)
    assert "round.trial_started" not in kinds
    assert kinds.count("gate.decided") == 1


def test_a_re_merge_repeats_the_coefficients(bench: Bench) -> None:
    round_id = a_round(bench)
    found = learn(bench, round_id)
    again = admin.remerge(bench.store, "m", ["c"], "left", bench.clock.now()).id
    assert run_once(bench.store, bench.clock)
    for name in "abc":
        report(bench, again, name)
    assert bench.round(again).state == State.PUBLISHED
    a, b = found["a"][""], found["b"][""]
    taus = updates()
    mean = (a * taus["a"]["layer.0.weight"] + b * taus["b"]["layer.0.weight"]) / (a + b)
    got = bench.masters(bench.release())["layer.0.weight"].reshape(SHAPES["layer.0.weight"])
    np.testing.assert_allclose(got, random(0, 1.0)["layer.0.weight"] + mean, atol=2e-7)
    assert verified(bench, 2) == ("exact", [])
    recipe = ReleaseRecord.parse(bench.release().record).recipe
    assert {v for k, v in recipe.items() if k.startswith("coefficient.")} == {a, b}


@pytest.mark.parametrize(
    ("merge", "code"),
    [
        ({"method": "median"}, "merge.bad_parameter"),
        ({"method": "mean", "lower": -1}, "merge.bad_parameter"),
        ({"method": "pcb", "granularity": "layer"}, "policy.coefficients_by_layer"),
    ],
)
def test_a_method_that_cannot_weigh_is_refused(
    bench: Bench, merge: dict[str, Any], code: str
) -> None:
    learns = {key: value for key, value in merge.items() if key != "method"}
    with pytest.raises(ConfigError) as caught:
        a_round(bench, merge={"method": merge["method"]}, **learns)
    assert caught.value.code == code


def test_the_migration_goes_down_and_up_with_rounds_in_it(bench: Bench) -> None:
    round_id = a_round(bench)
    learn(bench, round_id)
    database = bench.store.database
    url = database.engine.url.render_as_string(hide_password=False)
    downgrade(url, "0003")
    assert "coefficients" not in {c["name"] for c in inspect(database.engine).get_columns("round")}
    migrate(url)
    assert bench.round(round_id).coefficients is None
