from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import Signed
from coldmerge.core.errors import (
    ConflictError,
    DataError,
    PermissionDeniedError,
    TaskVectorError,
    UnavailableError,
)
from coldmerge.core.task_vector import TaskVector
from coldmerge.wire.v1 import common_pb2, contributions_pb2
from coldmerge_client import sent_log
from coldmerge_client.bases import open_round
from coldmerge_client.outbox import Outbox
from coldmerge_client.policy import SendPolicy
from coldmerge_client.prepare import Facts, Leaving, check_message, describe, prepare, preview
from coldmerge_client.pull import pull
from coldmerge_client.push import push, send
from coldmerge_client.session import Session
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.support import write_model

FACTS = Facts(examples=12, metrics={"accuracy": 0.75}, training={"epochs": 1.0})


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), seed=3))


@pytest.fixture
def opened(coordinator: Coordinator) -> common_pb2.Round:
    return coordinator.open_round(min_contributions=2)


def admitted(session: Session, round_id: str) -> list[contributions_pb2.Contribution]:
    return [
        found
        for found in session.contributions("m", round_id)
        if found.state == contributions_pb2.Contribution.ADMITTED
    ]


def test_a_push_ends_with_a_signed_receipt(
    opened: common_pb2.Round, session: Session, tuned: Path, coordinator: Coordinator
) -> None:
    entry = push(session, "m", tuned, FACTS)
    assert entry.state == "sent"
    assert entry.receipt is not None
    (found,) = admitted(session, opened.id)
    assert found.id == entry.receipt.contribution
    assert found.manifest_digest == entry.manifest.digest()
    stored = coordinator.folder / "contributions" / f"{found.id}.safetensors"
    assert TaskVector.open(stored).names == {"body.large", "body.small"}
    assert Outbox(session.home).get(entry.id).receipt == entry.receipt
    assert not entry.payload.exists()


def test_the_sent_log_lists_what_left(
    opened: common_pb2.Round, session: Session, tuned: Path
) -> None:
    entry = push(session, "m", tuned, FACTS)
    joined, contribution, receipt = sent_log.read(session.home)
    assert joined.event == "join"
    assert contribution.event == "contribution"
    assert contribution.body["manifest"] == entry.manifest.digest()
    assert contribution.body["payload_bytes"] == entry.manifest.payload_bytes
    assert contribution.body["metrics"] == {"accuracy": 0.75}
    assert receipt.body["contribution"] == admitted(session, opened.id)[0].id


def test_what_would_leave_is_said_exactly(
    opened: common_pb2.Round, session: Session, tuned: Path
) -> None:
    entry = prepare(session, open_round(session, "m", 0), tuned, FACTS)
    leaving = describe(entry)
    sizes = {name: base_tensors()[name].nbytes for name in ("body.large", "body.small")}
    assert dict(leaving.tensors) == sizes
    assert leaving.payload_bytes == sum(sizes.values())
    assert leaving.numbers == {"examples": 12, "accuracy": 0.75, "epochs": 1.0}
    kept = {name for name, _ in leaving.kept_home}
    assert kept == {"body.buffer", "classifier.weight", "my_head.weight"}
    delta = np.concatenate(
        [
            tuned_tensors(base_tensors(), 3)[name] - base_tensors()[name]
            for name in ("body.large", "body.small")
        ]
    )
    assert leaving.norm == pytest.approx(float(np.linalg.norm(delta.astype(np.float64))), rel=1e-6)
    base = pull(session, "m")
    assert preview(session, base, tuned, FACTS) == leaving
    assert not list(session.home.cache.glob("tmp*"))
    assert admitted(session, opened.id) == []


def test_a_refusal_leaves_nothing_sent(
    opened: common_pb2.Round, coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    shown: list[Leaving] = []

    def refuse(leaving: Leaving) -> bool:
        shown.append(leaving)
        return False

    policy = SendPolicy(require_approval=True)
    for approve in (refuse, None):
        with pytest.raises(PermissionDeniedError) as error:
            push(session, "m", tuned, FACTS, policy=policy, approve=approve)
        assert error.value.code == "push.not_approved"
    assert len(shown) == 1
    assert [line.event for line in sent_log.read(session.home)] == ["join"]
    assert admitted(session, opened.id) == []
    assert list((coordinator.folder / "uploads").iterdir()) == []


def test_approval_is_asked_once(opened: common_pb2.Round, session: Session, tuned: Path) -> None:
    entry = prepare(session, opened, tuned, FACTS)
    Outbox(session.home).mark(entry, approved=True)
    policy = SendPolicy(require_approval=True)
    assert send(session, entry, policy=policy).state == "sent"
    assert send(session, entry, policy=policy).state == "sent"
    assert len(admitted(session, opened.id)) == 1


def test_the_policy_file_of_the_home_holds(
    opened: common_pb2.Round, session: Session, tuned: Path
) -> None:
    session.home.policy.write_text("max_bytes: 100\n")
    with pytest.raises(PermissionDeniedError, match="larger than this machine"):
        push(session, "m", tuned, FACTS)
    session.home.policy.write_text("private: ['body.small']\nencoding: bf16\nmetrics: false\n")
    leaving = describe(push(session, "m", tuned, FACTS))
    assert dict(leaving.tensors) == {"body.large": base_tensors()["body.large"].nbytes // 2}
    assert leaving.numbers == {"examples": 12}
    assert leaving.encoding == "bf16"


@pytest.mark.parametrize("stricter", [{"private": ("body.small",)}, {"metrics": False}])
def test_a_policy_made_stricter_holds_for_what_waits_in_the_outbox(
    opened: common_pb2.Round, session: Session, tuned: Path, stricter: dict[str, Any]
) -> None:
    entry = prepare(session, opened, tuned, FACTS)
    with pytest.raises(PermissionDeniedError) as error:
        send(session, entry, policy=SendPolicy(**stricter))
    assert error.value.code == "push.against_own_policy"
    assert [line.event for line in sent_log.read(session.home)] == ["join"]
    assert admitted(session, opened.id) == []


def test_a_list_of_tensors_too_long_for_a_message(
    opened: common_pb2.Round, session: Session, tuned: Path
) -> None:
    manifest = prepare(session, opened, tuned, FACTS).manifest
    entry = manifest.tensors[0]
    many = tuple(entry.model_copy(update={"name": f"layer.{i}.weight"}) for i in range(30_000))
    with pytest.raises(TaskVectorError) as error:
        check_message(manifest.model_copy(update={"tensors": many}))
    assert error.value.code == "push.too_many_tensors"


def test_a_push_needs_an_open_round_on_its_base(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    with pytest.raises(ConflictError) as error:
        push(session, "m", tuned, FACTS)
    assert error.value.code == "push.no_open_round"
    coordinator.open_round(min_contributions=2)
    with pytest.raises(ConflictError) as other:
        push(session, "m", tuned, FACTS, base=3)
    assert other.value.code == "push.other_base"


@pytest.mark.parametrize(
    "facts", [Facts(0), Facts(1, {"Not A Name": 1.0}), Facts(1, {"x": np.nan})]
)
def test_numbers_that_cannot_be_sent(
    opened: common_pb2.Round, session: Session, tuned: Path, facts: Facts
) -> None:
    with pytest.raises(DataError, match="cannot be sent"):
        push(session, "m", tuned, facts)
    assert Outbox(session.home).entries() == ()
    assert list(session.home.outbox.iterdir()) == []


def test_a_fine_tune_that_cannot_be_extracted_leaves_the_outbox_empty(
    opened: common_pb2.Round, session: Session, tmp_path: Path
) -> None:
    broken = tuned_tensors(base_tensors(), 3)
    broken["body.small"] = np.full(16, np.nan, np.float32)
    with pytest.raises(TaskVectorError):
        push(session, "m", write_model(tmp_path / "broken", broken), FACTS)
    assert list(session.home.outbox.iterdir()) == []


def test_a_newer_fine_tune_replaces_one_that_was_not_sent(
    opened: common_pb2.Round, session: Session, tuned: Path, tmp_path: Path
) -> None:
    first = prepare(session, opened, tuned, FACTS)
    newer = write_model(tmp_path / "newer", tuned_tensors(base_tensors(), 4))
    second = prepare(session, opened, newer, FACTS)
    outbox = Outbox(session.home)
    assert outbox.get(first.id).state == "refused"
    assert outbox.for_round(opened.id) == second
    with pytest.raises(ConflictError, match="not in the outbox any more"):
        send(session, first)


def test_a_second_machine_replaces_the_contribution_of_the_first(
    opened: common_pb2.Round,
    coordinator: Coordinator,
    session: Session,
    tuned: Path,
    tmp_path: Path,
) -> None:
    push(session, "m", tuned, FACTS)
    with Session.open(coordinator.join(tmp_path / "second", "org-a", "server")) as second:
        newer = write_model(tmp_path / "newer", tuned_tensors(base_tensors(), 4))
        entry = push(second, "m", newer, FACTS)
        assert entry.receipt is not None
        (found,) = admitted(session, opened.id)
        assert found.id == entry.receipt.contribution


def test_a_crash_after_the_commit_finds_the_receipt(
    opened: common_pb2.Round, session: Session, tuned: Path, tmp_path: Path
) -> None:
    entry = prepare(session, opened, tuned, FACTS)
    payload = entry.payload.read_bytes()
    sent = send(session, entry)
    for name in ("receipt.json", "receipt.sig"):
        (entry.folder / name).unlink()
    entry.payload.write_bytes(payload)
    Outbox(session.home).mark(entry, state="sending")
    again = send(session, Outbox(session.home).get(entry.id))
    assert again.receipt == sent.receipt
    assert len(admitted(session, opened.id)) == 1
    events = [line.event for line in sent_log.read(session.home)]
    assert events.count("contribution") == 1


def test_a_round_that_sealed_before_the_push_takes_nothing(
    coordinator: Coordinator, session: Session, tuned: Path, tmp_path: Path
) -> None:
    opened = coordinator.open_round(min_contributions=1)
    entry = prepare(session, opened, tuned, FACTS)
    with Session.open(coordinator.join(tmp_path / "b", "org-b")) as other:
        push(other, "m", write_model(tmp_path / "t", tuned_tensors(base_tensors(), 5)), FACTS)
    with pytest.raises(ConflictError):
        send(session, entry)
    assert Outbox(session.home).get(entry.id).pending


def test_an_unreachable_coordinator_ends_the_push_and_keeps_the_entry(
    opened: common_pb2.Round, coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    entry = prepare(session, opened, tuned, FACTS)
    coordinator.stop()
    session.timeout = 1.0
    with pytest.raises(UnavailableError):
        send(session, entry)
    assert Outbox(session.home).get(entry.id).pending
    coordinator.start()
    session.timeout = 15.0
    assert send(session, Outbox(session.home).get(entry.id)).state == "sent"


def test_bf16_is_rounded_to_nearest(
    opened: common_pb2.Round, session: Session, tuned: Path
) -> None:
    entry = prepare(session, opened, tuned, FACTS, policy=SendPolicy(encoding="bf16"))
    base = Checkpoint.open(pull(session, "m").folder).block("body.small", 0, 16)
    delta = tuned_tensors(base_tensors(), 3)["body.small"] - base
    stored = TaskVector.open(entry.payload).block("body.small", 0, 16)
    assert np.array_equal(stored, delta.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_an_upload_that_the_coordinator_dropped_is_begun_again(
    opened: common_pb2.Round,
    session: Session,
    coordinator: Coordinator,
    tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others' calls drop the uploads of rounds that have ended; this one's round has not."""
    begun: list[str] = []

    def begin(self: Session, manifest: Signed) -> contributions_pb2.BeginResponse:
        answer = ask(self, manifest)
        if not begun:
            coordinator.stop(signal.SIGKILL)
            with closing(sqlite3.connect(coordinator.folder / "coldmerge.db")) as database:
                database.execute("DELETE FROM upload")
                database.commit()
            coordinator.start()
        begun.append(answer.upload_id)
        return answer

    ask = Session.begin
    monkeypatch.setattr(Session, "begin", begin)
    assert push(session, "m", tuned, FACTS, base=0).receipt is not None
    assert len(begun) > 1
