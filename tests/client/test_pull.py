from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import content_entries
from coldmerge.core.errors import (
    IntegrityError,
    ManifestError,
    NotFoundError,
    UnavailableError,
)
from coldmerge.wire.v1 import admin_pb2, common_pb2
from coldmerge_client.home import Home, Seen
from coldmerge_client.prepare import Facts
from coldmerge_client.pull import prune, pull, pull_candidate
from coldmerge_client.push import push
from coldmerge_client.session import Session
from tests.client.conftest import (
    Coordinator,
    Relay,
    base_tensors,
    through,
    tuned_tensors,
)
from tests.support import until, write_model

State = common_pb2.Round


def publish(
    coordinator: Coordinator, session: Session, folder: Path, *, seed: int = 1, **policy: Any
) -> str:
    """One round with one contribution, until it published (or waits for its gate)."""
    coordinator.open_round(**policy)
    tuned = write_model(folder, tuned_tensors(base_tensors(), seed=seed))
    entry = push(session, "m", tuned, Facts(examples=5))
    done = (State.PUBLISHED, State.CANDIDATE)
    until("the round", lambda: session.round(entry.manifest.round).state in done, 30)
    return entry.manifest.round


def test_a_release_arrives_whole_and_only_once(session: Session) -> None:
    pulled = pull(session, "m")
    assert pulled.number == 0
    checkpoint = Checkpoint.open(pulled.folder)
    assert content_entries(checkpoint).digest == pulled.digest
    for name, array in base_tensors().items():
        assert checkpoint.array(name).tobytes() == array.tobytes()
    assert (pulled.folder / "tokenizer.json").read_text() == "{}"
    assert pulled.private == ("classifier.*",)
    assert pulled.copied == 0
    assert pulled.downloaded > sum(array.nbytes for array in base_tensors().values())
    assert not list(session.home.cache.rglob("*.part"))
    again = pull(session, "m", 0)
    assert (again.folder, again.downloaded, again.copied) == (pulled.folder, 0, 0)
    seen = session.home.seen("m")
    assert seen is not None
    assert (seen.number, seen.content_digest) == (0, pulled.digest)


def test_unknown_models_and_releases(session: Session) -> None:
    with pytest.raises(NotFoundError):
        pull(session, "other")
    with pytest.raises(NotFoundError):
        pull(session, "m", 7)
    with pytest.raises(NotFoundError):
        pull_candidate(session, "m", "0" * 64)


def test_unchanged_tensors_are_copied_from_the_release_before(
    coordinator: Coordinator, relay: Relay, session: Session, tmp_path: Path
) -> None:
    publish(coordinator, session, tmp_path / "tuned")
    through(session.home, relay)
    with Session.open(session.home) as counted:
        before = relay.down
        pulled = pull(counted, "m")
    changed = sum(base_tensors()[name].nbytes for name in ("body.large", "body.small"))
    assert pulled.number == 1
    assert pulled.downloaded == changed
    assert pulled.copied > 0
    assert changed < relay.down - before < changed + 16_000
    assert content_entries(Checkpoint.open(pulled.folder)).digest == pulled.digest


def test_a_damaged_local_release_is_not_copied_from(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    publish(coordinator, session, tmp_path / "tuned")
    weights = session.home.release("m", 0) / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-40:] = bytes(40)
    weights.write_bytes(raw)
    pulled = pull(session, "m")
    assert content_entries(Checkpoint.open(pulled.folder)).digest == pulled.digest


def test_a_local_release_that_lost_a_file_is_not_copied_from(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    publish(coordinator, session, tmp_path / "tuned")
    (session.home.release("m", 0) / "tokenizer.json").unlink()
    pulled = pull(session, "m")
    assert (pulled.folder / "tokenizer.json").read_text() == "{}"


def test_a_candidate_is_pulled_by_its_digest(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    round_id = publish(
        coordinator, session, tmp_path / "tuned", gate={"min_evaluators": 1, "window": "1h"}
    )
    found = session.round(round_id)
    assert found.state == State.CANDIDATE
    pulled = pull_candidate(session, "m", found.candidate_digest)
    assert pulled.number is None
    assert content_entries(Checkpoint.open(pulled.folder)).digest == found.candidate_digest
    assert pulled.copied > 0
    assert pull_candidate(session, "m", found.candidate_digest).downloaded == 0
    assert session.home.seen("m") == Seen(*_seen(session, 0))
    prune(session.home, "m", keep=1)
    assert not pulled.folder.exists()
    assert session.home.local_releases("m") == [0]


def _seen(session: Session, number: int) -> tuple[int, str, str]:
    seen = session.home.seen("m")
    assert seen is not None
    assert seen.number == number
    return seen.number, seen.content_digest, seen.record_digest


def test_an_older_release_than_the_last_seen_is_refused(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    pull(session, "m")
    publish(coordinator, session, tmp_path / "tuned")
    pull(session, "m")
    with pytest.raises(IntegrityError) as error:
        pull(session, "m", 0)
    assert error.value.code == "release.older_than_seen"
    assert pull(session, "m", 0, allow_older=True).number == 0
    assert _seen(session, 1)[0] == 1


def test_a_coordinator_whose_database_went_back_is_refused(
    coordinator: Coordinator, session: Session
) -> None:
    session.home.saw("m", Seen(4, "a" * 64, "b" * 64))
    with pytest.raises(IntegrityError, match="older than the last one seen"):
        pull(session, "m")
    assert not session.home.releases("m").exists()


def test_a_rollback_is_a_new_number_and_welcome(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    first = pull(session, "m")
    publish(coordinator, session, tmp_path / "tuned")
    pull(session, "m")
    coordinator.admin("Rollback", admin_pb2.RollbackRequest(model="m", number=0, reason="worse"))
    pulled = pull(session, "m")
    assert (pulled.number, pulled.digest) == (2, first.digest)
    assert pulled.downloaded == 0


def test_skipped_releases_must_chain_up(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    with Session.open(coordinator.join(tmp_path / "other", "org-b")) as other:
        pull(session, "m")
        publish(coordinator, other, tmp_path / "tuned")
        coordinator.admin("Rollback", admin_pb2.RollbackRequest(model="m", number=0))
        assert pull(session, "m").number == 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_rewritten_history_is_refused(
    coordinator: Coordinator, session: Session, tmp_path: Path, number: int
) -> None:
    with Session.open(coordinator.join(tmp_path / "other", "org-b")) as other:
        if number:
            publish(coordinator, other, tmp_path / "tuned")
    session.home.saw("m", Seen(0, "a" * 64, "b" * 64))
    with pytest.raises(IntegrityError) as error:
        pull(session, "m")
    assert error.value.code == "release.rewritten_history"


def test_a_rewritten_history_is_refused_by_number_too(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    with Session.open(coordinator.join(tmp_path / "other", "org-b")) as other:
        publish(coordinator, other, tmp_path / "tuned")
    session.home.saw("m", Seen(0, "a" * 64, "b" * 64))
    with pytest.raises(IntegrityError) as error:
        pull(session, "m", 1, allow_older=True)
    assert error.value.code == "release.rewritten_history"


def test_a_gap_in_what_was_seen_is_followed(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    pull(session, "m")
    with Session.open(coordinator.join(tmp_path / "other", "org-b")) as other:
        publish(coordinator, other, tmp_path / "first")
        publish(coordinator, other, tmp_path / "second", seed=2)
        publish(coordinator, other, tmp_path / "third", seed=3)
    between = session.releases_between("m", 0, 3)
    assert [release.number for release in between] == [1, 2]
    assert pull(session, "m").number == 3


def test_a_record_signed_by_another_key_is_refused(session: Session) -> None:
    another = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    session.member = replace(session.member, signing_key=another)
    with pytest.raises(ManifestError, match="signature"):
        pull(session, "m")
    assert session.home.seen("m") is None


def test_wrong_bytes_are_refused(coordinator: Coordinator, session: Session) -> None:
    release = session.release("m")
    sha256 = next(t.sha256 for t in release.tensors if t.name == "body.small")
    blob = coordinator.folder / "blobs" / sha256[:2] / sha256
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(IntegrityError):
        pull(session, "m")
    assert not session.home.release("m", 0).exists()


@pytest.fixture
def large(make_coordinator: Callable[..., Coordinator]) -> Coordinator:
    return make_coordinator(base_tensors(6 * 2**20))


@pytest.fixture
def line(large: Coordinator) -> Iterator[Relay]:
    made = Relay(large.addresses()["api"])
    yield made
    made.close()


SIZE = 24 * 2**20


def test_a_pull_goes_on_when_the_link_breaks(
    large: Coordinator, line: Relay, tmp_path: Path
) -> None:
    home = through(large.join(tmp_path / "home"), line)
    with Session.open(home, timeout=20) as session:
        line.cut_after(down=SIZE // 2)
        pulled = pull(session, "m")
    assert line.cuts == 1
    assert content_entries(Checkpoint.open(pulled.folder)).digest == pulled.digest
    assert line.down < SIZE + 10 * 2**20


def test_a_pull_resumes_in_another_process_run(
    large: Coordinator, line: Relay, tmp_path: Path
) -> None:
    home = through(large.join(tmp_path / "home"), line)
    line.cut_after(down=SIZE // 2)
    line.once = True
    began = time.monotonic()
    with Session.open(home, timeout=1) as session, pytest.raises(UnavailableError):
        pull(session, "m")
    assert time.monotonic() - began < 20
    assert not home.release("m", 0).exists()
    there = arrived(home)
    assert there > SIZE // 4
    line.once = False
    before = line.down
    with Session.open(home) as session:
        pulled = pull(session, "m")
    assert content_entries(Checkpoint.open(pulled.folder)).digest == pulled.digest
    assert line.down - before < SIZE - there + 2 * 2**20
    assert not list((home.cache / "pull").rglob("*.safetensors"))


def arrived(home: Home) -> int:
    """Bytes that an unfinished pull has written down as arrived."""
    (ledger,) = (home.cache / "pull").rglob("ledger")
    return int(np.frombuffer(ledger.read_bytes(), "<u8").sum())


def interrupted(home: Home, line: Relay) -> Path:
    """Pull over a line that breaks in the middle: the file that was growing."""
    line.cut_after(down=SIZE // 2)
    line.once = True
    with Session.open(home, timeout=1) as session, pytest.raises(UnavailableError):
        pull(session, "m")
    line.once = False
    (growing,) = (home.cache / "pull").rglob("*.safetensors")
    return growing


def test_what_an_interrupted_pull_left_is_hashed_before_it_is_used(
    large: Coordinator, line: Relay, tmp_path: Path
) -> None:
    home = through(large.join(tmp_path / "home"), line)
    growing = interrupted(home, line)
    there, before = arrived(home), line.down
    growing.write_bytes(bytes(growing.stat().st_size))
    with Session.open(home) as session:
        pulled = pull(session, "m")
    assert there > SIZE // 4
    assert line.down - before > SIZE - 2**20
    assert content_entries(Checkpoint.open(pulled.folder)).digest == pulled.digest


def test_a_tensor_that_is_there_twice_is_fetched_once(
    make_coordinator: Callable[..., Coordinator], tmp_path: Path
) -> None:
    tensors = base_tensors(2**20)
    twice = {**tensors, "body.tied": tensors["body.large"].copy()}
    made = make_coordinator(twice)
    with Session.open(made.join(tmp_path / "home")) as session:
        pulled = pull(session, "m")
    checkpoint = Checkpoint.open(pulled.folder)
    assert content_entries(checkpoint).digest == pulled.digest
    assert pulled.downloaded < sum(array.nbytes for array in twice.values())
    assert checkpoint.array("body.tied").tobytes() == tensors["body.large"].tobytes()


def test_the_values_arrive_in_their_own_type(session: Session) -> None:
    checkpoint = Checkpoint.open(pull(session, "m").folder)
    assert checkpoint.dtype("body.half") == "BF16"
    assert checkpoint.dtype("body.buffer") == "I64"
    half = np.asarray(base_tensors()["body.half"]).astype(np.float32).ravel()
    assert np.array_equal(checkpoint.block("body.half", 0, 128), half)
