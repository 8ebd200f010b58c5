"""A rejected candidate, and the coordinator's search for whose update it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from coldmerge.core.documents import ReleaseRecord, sign
from coldmerge.rounds.state import Abandon, State
from coldmerge_coordinator.audit.checkpoints import current
from coldmerge_coordinator.audit.export import check_stored
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.service.messages import round_message
from coldmerge_coordinator.store import contributions, releases, rounds
from coldmerge_coordinator.store.models import Notice
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once
from tests.support import evaluation

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

NAMES = "abcdef"
HOOK = "https://example.org/hook"


def random(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1e-2, (20, 30)).astype(np.float32)


def a_round(bench: Bench, merge: dict[str, object] | None = None, **gate: object) -> str:
    """Six contributions, merged."""
    bench.add_model({"body.weight": random(0)})
    rules = {"min_evaluators": 6, "max_vetoes": 0, "on_reject": "isolate", **gate}
    round_id = bench.open_round(min_contributions=6, gate=rules, webhook=HOOK, merge=merge or {})
    for number, name in enumerate(NAMES, 1):
        bench.contribute(round_id, name, {"body.weight": random(number)})
    assert run_once(bench.store, bench.clock)
    return round_id


def report(bench: Bench, round_id: str, name: str, points: int) -> None:
    row = bench.round(round_id)
    judged = evaluation(row, name, bench.clock.now(), points)
    signed = sign(judged, Ed25519PrivateKey.generate())
    with bench.store.database.write() as session:
        locked = rounds.get(session, round_id, lock=True)
        now, signer = bench.clock.now(), bench.store.signer
        rounds.record_evaluation(session, locked, signed, now, signer)


def left_out(bench: Bench, round_id: str) -> set[str]:
    with bench.store.database.read() as session:
        row = rounds.get(session, round_id)
        return {
            item.contributor
            for item in contributions.of_round(session, round_id)
            if item.manifest_digest in (row.left_out or ())
        }


def judge_until_it_ends(bench: Bench, round_id: str, culprit: str) -> list[int]:
    """Everybody judges every trial: how many each left out."""
    sizes = []
    while bench.round(round_id).state == State.CANDIDATE:
        points = 3 if culprit in left_out(bench, round_id) else -9
        trial = bench.round(round_id).trial
        for name in NAMES:
            report(bench, round_id, name, points)
        if bench.round(round_id).state != State.SEALED:
            break
        assert bench.round(round_id).trial == trial + 1
        sizes.append(len(left_out(bench, round_id)))
        assert run_once(bench.store, bench.clock)
    return sizes


@pytest.mark.parametrize("culprit", NAMES)
def test_the_release_is_merged_without_the_culprits_group(bench: Bench, culprit: str) -> None:
    round_id = a_round(bench)
    first = bench.round(round_id).candidate_digest
    sizes = judge_until_it_ends(bench, round_id, culprit)
    row, out = bench.round(round_id), left_out(bench, round_id)
    assert (row.state, row.release_number) == ("PUBLISHED", 1)
    assert culprit in out
    assert len(out) == 2
    assert len(sizes) <= 4
    assert bench.release().content_digest != first
    kept = [random(number) for number, name in enumerate(NAMES, 1) if name not in out]
    master = bench.masters(bench.release())["body.weight"]
    np.testing.assert_allclose(master, (random(0) + np.mean(kept, 0)).ravel(), atol=1e-7)


def test_record_and_history_say_who_was_kept(bench: Bench) -> None:
    round_id = a_round(bench)
    judge_until_it_ends(bench, round_id, "c")
    row = bench.round(round_id)
    record = ReleaseRecord.parse(bench.release().record)
    out = set(row.left_out or ())
    assert record.flags == ("isolated",)
    assert set(record.contributions) == set(row.sealed_inputs or ()) - out
    assert record.recipe["isolation.left_out"] == 2
    assert record.recipe["isolation.trials"] == len((row.isolation or {})["trials"]) - 1
    with bench.store.database.read() as session:
        found = contributions.of_round(session, round_id)
        reasons = {item.manifest_digest: item.reason for item in found}
        kinds = [notice.body["kind"] for notice in session.scalars(select(Notice))]
        message = round_message(session, row, Caller("x", "m1", "contributor"))
        assert releases.latest_release(session, "m").number == 1
    assert {digest for digest, reason in reasons.items() if reason} == out
    assert {item.state for item in found} == {"ADMITTED"}
    assert kinds.count("round.isolating") == record.recipe["isolation.trials"]
    assert kinds.count("round.published") == 1
    assert (message.trial, message.left_out) == (row.trial, 2)
    assert [trial.passed for trial in message.trials][-1] or message.trials[-2].passed
    assert not any(name in str(message.trials) for name in ("left out by",))
    assert message.evaluations == 6, "those of the trial that was published"


def test_evaluations_of_another_trial_do_not_count(bench: Bench) -> None:
    round_id = a_round(bench)
    for name in NAMES:
        report(bench, round_id, name, -9)
    assert run_once(bench.store, bench.clock)
    with bench.store.database.read() as session:
        row = rounds.get(session, round_id)
        assert rounds.count_evaluations(session, row) == 0
    for name in NAMES[:5]:
        report(bench, round_id, name, 3)
    assert bench.round(round_id).state == State.CANDIDATE


def test_an_admin_ends_the_search(bench: Bench) -> None:
    round_id = a_round(bench)
    for name in NAMES:
        report(bench, round_id, name, -9)
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        rounds.apply(session, row, Abandon("enough"), bench.clock.now(), bench.store.signer)
    row = bench.round(round_id)
    assert (row.state, row.active) == ("ABANDONED", False)
    assert not run_once(bench.store, bench.clock)


def test_singles_need_the_consent_of_their_contributors(bench: Bench) -> None:
    round_id = a_round(bench, isolate_singles=True)
    with bench.store.database.write() as session:
        for item in contributions.of_round(session, round_id):
            manifest = contributions.get_manifest(item)
            agreed = manifest.model_copy(update={"consents": ("leave_one_out",)})
            item.manifest = agreed.canonical()
    judge_until_it_ends(bench, round_id, "d")
    assert left_out(bench, round_id) == {"d"}


def verified(bench: Bench, number: int) -> tuple[str, int, list[str]]:
    found = verify_release(bench.store, "m", number, bench.folder)
    return found.answer, found.merged, found.problems


@pytest.mark.parametrize("optimizer", [{"method": "none"}, {"method": "nesterov"}], ids=str)
def test_an_isolated_release_verifies_exactly_and_so_does_its_re_merge(
    bench: Bench, optimizer: dict[str, str]
) -> None:
    """What a trial left out is in no merge done again: not by verify, not by a re-merge."""
    round_id = a_round(bench, merge={"outer": optimizer})
    judge_until_it_ends(bench, round_id, "c")
    out = left_out(bench, round_id)
    assert verified(bench, 1) == ("exact", 4, [])
    later = bench.open_round(min_contributions=2)
    for number, name in enumerate("xy", 40):
        bench.contribute(later, name, {"body.weight": random(number)})
    assert run_once(bench.store, bench.clock)
    assert verified(bench, 2) == ("exact", 2, [])
    gone = min(set(NAMES) - out)
    again = admin.remerge(bench.store, "m", [gone], "left", bench.clock.now()).id
    assert run_once(bench.store, bench.clock)
    assert bench.round(again).state == State.PUBLISHED
    assert verified(bench, 3) == ("exact", 5, [])
    assert "remerged" in ReleaseRecord.parse(bench.release().record).flags
    for number in (0, 1, 2):
        assert verified(bench, number)[0] == "exact"
    head = current(bench.store, bench.clock.now())
    checked = check_stored(bench.store, head)
    assert checked.releases["m"].number == 3
    assert checked.unsigned == 0


def test_a_record_that_counts_who_was_left_out_is_different(bench: Bench) -> None:
    round_id = a_round(bench)
    judge_until_it_ends(bench, round_id, "c")
    with bench.store.database.write() as session:
        row = releases.get_release(session, "m", 1)
        sealed = tuple(sorted(bench.round(round_id).sealed_inputs or ()))
        forged = releases.get_record(row).model_copy(update={"contributions": sealed})
        signed = bench.store.signer.sign(forged)
        row.record, row.signature = signed.document, signed.signature
    answer, _, problems = verified(bench, 1)
    assert answer == "different"
    assert "the round froze other inputs than the record names" in problems
