"""Replicas that do the same thing at the same moment: each a store of its own, and a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import func, select

from coldmerge.core.documents import Signed, sign
from coldmerge.core.errors import ColdmergeError
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.state import Abandon
from coldmerge.wire.convert import timestamp
from coldmerge.wire.proofs import rekey_message
from coldmerge.wire.v1 import enrolment_pb2
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.identity import Authority
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.enrolment import EnrolmentService
from coldmerge_coordinator.service.intake import Intake
from coldmerge_coordinator.store import Store, leases, releases, rounds
from coldmerge_coordinator.store.models import (
    Contribution,
    Contributor,
    Invitation,
    Machine,
    Release,
    Round,
    Upload,
)
from tests.backends import replica
from tests.harness import MODEL, Keys, ShiftedClock, deltas, make_coordinator, make_manifest

REPLICAS = 4
TIMES = 2
CLOCK = ShiftedClock()


@dataclass
class Racer:
    """One replica, without its network."""

    store: Store

    def __post_init__(self) -> None:
        self.authority = Authority.open(self.store.folder, self.store.federation)
        self.intake = Intake(self.store, CLOCK)
        self.enrolment = EnrolmentService(Backend(self.store, CLOCK), self.authority)


@pytest.fixture
def racers(tmp_path: Path) -> Iterator[list[Racer]]:
    hub = make_coordinator(tmp_path / "hub")
    folders = [hub, *(replica(hub, tmp_path / f"hub-{n}") for n in range(1, REPLICAS))]
    for folder in folders[1:]:  # each with its own disk for what has not been counted yet
        (folder / "uploads").unlink(missing_ok=True)
    made = [Racer(Store.open(folder)) for folder in folders]
    yield made
    for racer in made:
        racer.intake.close()
        racer.store.close()


def race(*runners: Callable[[], Any]) -> list[Any]:
    """What each returned, or the error it raised; all began at the same moment."""
    barrier, results = threading.Barrier(len(runners)), list[Any]([None] * len(runners))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = runners[index]()
        except ColdmergeError as error:
            results[index] = error.code

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(runners))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def each(racers: Sequence[Racer], call: Callable[[Racer, int], Any]) -> list[Any]:
    """What the replicas answered that made the same call at the same moment."""
    return race(*(partial(call, racer, number) for number, racer in enumerate(racers)))


def invite(store: Store, name: str) -> str:
    return admin.invite(store, name, "contributor", timedelta(hours=1), CLOCK.now()).token


def count(store: Store, *where: Any) -> int:
    with store.database.read() as session:
        return session.execute(select(func.count()).where(*where)).scalar_one()


def open_round(store: Store, **policy: object) -> Round:
    chosen = RoundPolicy.model_validate({"min_contributions": 9, "gate": None, **policy})
    return admin.open_round(store, MODEL, chosen.model_dump_json(), CLOCK.now())


@dataclass
class Member:
    """An enrolled machine whose calls go to any replica."""

    who: Caller
    keys: Keys
    federation: str

    def manifest(self, round_: Round, seed: int, **changes: Any) -> tuple[Signed, bytes]:
        whose = {"federation": self.federation, "contributor": self.who.contributor}
        manifest, payload = make_manifest(round_, deltas(seed), CLOCK.now(), **{**whose, **changes})
        return sign(manifest, self.keys.identity), payload


def enrol(request: Any, racer: Racer) -> str:
    return racer.enrolment._enrol(request).role


def member(racer: Racer, name: str = "a") -> Member:
    keys = Keys.make()
    enrol(keys.enrol_request(invite(racer.store, name)), racer)
    return Member(Caller(name, "box", "contributor", keys.public), keys, racer.store.federation)


def begin(org: Member, signed: Signed, racer: Racer) -> str:
    return racer.intake.begin(org.who, signed).id


def commit(org: Member, upload: str, racer: Racer) -> str:
    return racer.intake.commit(org.who, upload).state


def begun(racer: Racer, org: Member, round_: Round, seed: int) -> str:
    """An upload that waits for its commit."""
    signed, payload = org.manifest(round_, seed)
    live = racer.intake.begin(org.who, signed)
    assert not isinstance(live, Contribution)
    live.write(live.take(), 0, payload)
    return live.id


def all_but_one(*expected: str) -> list[str]:
    """What a race ends with that one wins: his answer, then everybody else's."""
    winner, loser = expected
    return sorted([winner, *[loser] * (REPLICAS - 1)])


def test_an_invitation_is_used_once(racers: list[Racer]) -> None:
    for turn in range(TIMES):
        token = invite(racers[0].store, f"org-{turn}")
        requests = [Keys.make().enrol_request(token, f"box-{n}") for n in range(REPLICAS)]
        results = race(*map(partial, [enrol] * REPLICAS, requests, racers))
        assert sorted(results) == all_but_one("contributor", "enrolment.bad_invitation")
        assert count(racers[0].store, Machine.contributor == f"org-{turn}") == 1


def test_a_key_becomes_one_machine(racers: list[Racer]) -> None:
    for turn in range(TIMES):
        keys = Keys.make()
        names = [f"org-{turn}-{n}" for n in range(REPLICAS)]
        requests = [keys.enrol_request(invite(racers[0].store, name)) for name in names]
        results = race(*map(partial, [enrol] * REPLICAS, requests, racers))
        assert sorted(results) == all_but_one("contributor", "enrolment.known_key")
        assert count(racers[0].store, Machine.identity_public_key == keys.public) == 1


def test_a_machines_name_is_given_once(racers: list[Racer]) -> None:
    for turn in range(TIMES):
        tokens = [invite(racers[0].store, f"org-{turn}") for _ in racers]
        requests = [Keys.make().enrol_request(token) for token in tokens]
        results = race(*map(partial, [enrol] * REPLICAS, requests, racers))
        assert sorted(results) == all_but_one("contributor", "enrolment.machine_exists")


def test_a_new_organization_is_made_once(racers: list[Racer]) -> None:
    for turn in range(TIMES):
        name = f"org-{turn}"
        tokens = race(*(partial(invite, racer.store, name) for racer in racers))
        assert len(set(tokens)) == REPLICAS
        assert count(racers[0].store, Contributor.name == name) == 1
        assert count(racers[0].store, Invitation.contributor == name) == REPLICAS


def test_one_round_is_opened(racers: list[Racer]) -> None:
    for _ in range(TIMES):
        results = each(racers, lambda racer, _number: open_round(racer.store).id)
        (opened,) = [result for result in results if result.startswith("round-")]
        assert set(results) == {opened, "round.already_active"}
        admin.move_round(racers[0].store, opened, Abandon("next"), CLOCK.now())


def test_a_manifest_is_begun_once_whoever_asks(racers: list[Racer]) -> None:
    org, round_ = member(racers[0]), open_round(racers[0].store)
    for seed in range(TIMES):
        signed, _payload = org.manifest(round_, seed)
        found = race(*(partial(begin, org, signed, racer) for racer in racers))
        assert len(set(found)) == 1, found
        assert count(racers[0].store, Upload.id == found[0]) == 1


def test_a_nonce_is_used_once(racers: list[Racer]) -> None:
    org, round_ = member(racers[0]), open_round(racers[0].store)
    signed = [org.manifest(round_, seed, nonce="0" * 32)[0] for seed in range(REPLICAS)]
    found = race(*(partial(begin, org, *pair) for pair in zip(signed, racers, strict=True)))
    assert sorted(found)[: REPLICAS - 1] == ["manifest.replayed"] * (REPLICAS - 1)
    assert count(racers[0].store, Upload.id == max(found)) == 1


def test_open_uploads_are_counted_across_replicas(racers: list[Racer]) -> None:
    org, round_, most = member(racers[0]), open_round(racers[0].store), 2
    for racer in racers:
        limits = racer.store.config.limits.model_copy(update={"max_open_uploads": most})
        racer.store.config = racer.store.config.model_copy(update={"limits": limits})
    signed = [org.manifest(round_, seed)[0] for seed in range(REPLICAS)]
    found = race(*(partial(begin, org, *pair) for pair in zip(signed, racers, strict=True)))
    assert found.count("upload.too_many") == REPLICAS - most
    assert count(racers[0].store, Upload.contributor == "a") == most


def test_the_last_of_several_commits_counts(racers: list[Racer]) -> None:
    org, round_ = member(racers[0]), open_round(racers[0].store)
    for turn in range(TIMES):
        uploads = [begun(racer, org, round_, 10 * turn + n) for n, racer in enumerate(racers)]
        results = race(*(partial(commit, org, *pair) for pair in zip(uploads, racers, strict=True)))
        assert results == ["ADMITTED"] * REPLICAS
        admitted = (Contribution.contributor == "a", Contribution.state == "ADMITTED")
        assert count(racers[0].store, *admitted) == 1
        assert count(racers[0].store, Upload.contributor == "a") == 0


def test_who_is_revoked_has_nothing_in_an_open_round(racers: list[Racer]) -> None:
    round_ = open_round(racers[0].store)
    for turn in range(TIMES):
        name = f"org-{turn}"
        org = member(racers[0], name)
        upload = begun(racers[0], org, round_, turn)
        committed, revoked = race(
            partial(commit, org, upload, racers[0]),
            partial(admin.revoke, racers[1].store, name, "", "why", CLOCK.now()),
        )
        assert revoked.revoked_at is not None
        assert committed in ("ADMITTED", "auth.revoked")
        admitted = (Contribution.contributor == name, Contribution.state == "ADMITTED")
        assert count(racers[0].store, *admitted) == 0


def publish(racer: Racer, _number: int) -> int:
    with racer.store.database.write() as session:
        last = releases.latest_release(session, MODEL)
        digests = last.content_digest, last.master_digest
        signer, now = racer.store.signer, CLOCK.now()
        recipe: releases.Recipe = {"method": "test"}
        return releases.publish(session, signer, MODEL, *digests, now, recipe=recipe).number


def test_release_numbers_have_no_gap(racers: list[Racer]) -> None:
    numbers = [number for _ in range(TIMES) for number in each(racers, publish)]
    assert sorted(numbers) == list(range(1, TIMES * REPLICAS + 1))
    with racers[0].store.database.read() as session:
        found = session.scalars(select(Release).order_by(Release.number))
        chain = [releases.get_record(row) for row in found]
    assert [later.previous_record for later in chain[1:]] == [one.digest() for one in chain[:-1]]


def register(sizes: dict[str, int], racer: Racer, number: int) -> str:
    with racer.store.database.write() as session:
        releases.register(session, sizes, public=number % 2 == 0, now=CLOCK.now())
    return "done"


def test_the_same_blobs_are_written_down_by_all(racers: list[Racer]) -> None:
    for turn in range(TIMES):
        sizes = {f"{turn}{n:063x}": n for n in range(300)}
        assert each(racers, partial(register, sizes)) == ["done"] * REPLICAS
        with racers[0].store.database.read() as session:
            assert [releases.get_blob(session, sha256).nbytes for sha256 in sizes] == [*range(300)]


def take(name: str, racer: Racer, number: int) -> int:
    with racer.store.database.write() as session:
        term = timedelta(seconds=30)
        held = leases.acquire(session, name, f"holder-{number}", CLOCK.now(), term)
        return 0 if held is None else held.fence


def test_a_lease_has_one_holder(racers: list[Racer]) -> None:
    for turn in range(TIMES):
        fences = each(racers, partial(take, f"lease-{turn}"))
        assert sorted(fences) == [*[0] * (REPLICAS - 1), 1]


def test_a_contribution_is_replaced_or_taken_back_never_both(racers: list[Racer]) -> None:
    org, round_ = member(racers[0]), open_round(racers[0].store)
    for turn in range(TIMES):
        upload = begun(racers[0], org, round_, 20 + 2 * turn)
        first = racers[0].intake.commit(org.who, upload).id
        upload = begun(racers[1], org, round_, 21 + 2 * turn)
        withdrawn, committed = race(
            partial(racers[0].intake.withdraw, org.who, first),
            partial(commit, org, upload, racers[1]),
        )
        assert withdrawn.state in ("WITHDRAWN", "REPLACED")
        assert committed == "ADMITTED"
        with racers[0].store.database.read() as session:
            assert session.get_one(Contribution, first).state == withdrawn.state
            admitted = rounds.view(session, rounds.get(session, round_.id)).contributors
        assert admitted == ("a",)


def _rekey(org: Member, new: Keys, racer: Racer) -> None:
    at, csr = timestamp(CLOCK.now()), new.csr().public_bytes(Encoding.DER)
    message = rekey_message(at, new.public, csr)
    racer.enrolment._renew(
        enrolment_pb2.RenewRequest(
            contributor=org.who.contributor,
            machine=org.who.machine,
            csr_der=csr,
            at=at,
            proof=org.keys.identity.sign(message),
            new_identity_public_key=new.public,
            new_proof=new.identity.sign(message),
        )
    )


def _identity(racer: Racer, name: str) -> bytes:
    with racer.store.database.read() as session:
        return session.get_one(Machine, (name, "box")).identity_public_key


@pytest.mark.parametrize("time", range(TIMES))
def test_an_old_key_has_its_word_once(racers: list[Racer], time: int) -> None:
    org, new = member(racers[0], f"org-{time}"), [Keys.make() for _ in racers]
    results = each(racers, lambda racer, n: _rekey(org, new[n], racer))
    assert sorted(map(str, results)) == ["None", *["enrolment.bad_proof"] * (REPLICAS - 1)]
    assert _identity(racers[0], org.who.contributor) == new[results.index(None)].public


@pytest.mark.parametrize("time", range(TIMES))
def test_keys_that_an_invitation_replaces_stay_replaced(racers: list[Racer], time: int) -> None:
    name, keys = f"org-{time}", Keys.make()
    org = member(racers[0], name)
    token = admin.invite(
        racers[0].store, name, "contributor", timedelta(hours=1), CLOCK.now(), machine="box"
    ).token
    thieves = [partial(_rekey, org, Keys.make(), racer) for racer in racers[1:]]
    results = race(partial(enrol, keys.enrol_request(token), racers[0]), *thieves)
    assert results[0] == "contributor"
    assert _identity(racers[0], name) == keys.public
