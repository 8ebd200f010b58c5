"""Statistics leave when the round asks and the owner agrees, and not otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from coldmerge.core.errors import ColdmergeError, NotFoundError, PermissionDeniedError
from coldmerge.core.selection import kept
from coldmerge.core.task_vector import TaskVector
from coldmerge.rounds.policy import MergePolicy
from coldmerge.wire.v1 import common_pb2
from coldmerge_client import sent_log
from coldmerge_client.contribute import Step, Terms, contribute
from coldmerge_client.outbox import Outbox
from coldmerge_client.policy import SendPolicy
from coldmerge_client.prepare import Facts, asked_of, describe, merge_of, prepare, preview
from coldmerge_client.pull import pull
from coldmerge_client.push import push, send
from coldmerge_client.session import Session
from coldmerge_client.train import finished, train
from coldmerge_client.training.config import TrainConfig
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.store import Store
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.support import write_model
from tests.tiny import write_bert, write_texts

FACTS = Facts(examples=12)
TIES = {"method": "ties", "parameters": {"thresholds": "shipped", "density": 0.25}}


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A fine-tune whose owner measured its Fisher information elsewhere."""
    tensors = tuned_tensors(base_tensors(), seed=3)
    folder = write_model(tmp_path / "tuned", tensors)
    fisher = {
        f"{name}.fisher": np.full(tensors[name].shape, 0.5, np.float32)
        for name in ("body.large", "body.small", "classifier.weight")
    }
    write_model(folder / "statistics", fisher)
    (folder / "statistics" / "statistics.json").write_text('{"fisher": 77}')
    return folder


def stored(coordinator: Coordinator, identifier: str) -> TaskVector:
    return TaskVector.open(coordinator.folder / "contributions" / f"{identifier}.safetensors")


def refused(code: str, act: Callable[[], object]) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        act()
    assert caught.value.code == code
    return caught.value


def test_thresholds_go_without_being_allowed(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    coordinator.open_round(min_contributions=2, merge=TIES)
    entry = push(session, "m", tuned, FACTS)
    assert entry.receipt is not None
    vector = stored(coordinator, entry.receipt.contribution)
    assert vector.statistics == entry.manifest.statistics == {"trim": 0.25}
    values = np.abs(vector.block("body.large", 0, 4096))
    threshold = vector.statistic("body.large", "trim", 0, 1)
    assert threshold == np.sort(values)[-kept(0.25, 4096)]
    assert describe(entry).statistics == {"trim": 0.25}


def test_fisher_information_stays_until_its_owner_agrees(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    opened = coordinator.open_round(min_contributions=2, merge={"method": "fisher"})
    assert merge_of(opened).method == "fisher"
    error = refused("push.statistic_not_allowed", lambda: push(session, "m", tuned, FACTS))
    assert isinstance(error, PermissionDeniedError)
    assert error.expected == "`may_send: [fisher]` in policy.yaml"
    assert not Outbox(session.home).entries()
    base = pull(session, "m")
    assert asked_of(session, base) == frozenset()
    session.home.policy.write_text("may_send: [fisher]\n")
    assert asked_of(session, base) == {"fisher"}

    shown = preview(session, base, tuned, FACTS, merge=merge_of(opened))
    assert shown.statistics == {"fisher": 77}
    names = [name for name, _ in shown.tensors]
    assert names == ["body.large", "body.large.fisher", "body.small", "body.small.fisher"]

    entry = push(session, "m", tuned, FACTS)
    assert entry.receipt is not None
    vector = stored(coordinator, entry.receipt.contribution)
    assert vector.names == {"body.large", "body.small"}
    assert set(vector.statistic("body.large", "fisher", 0, 4096)) == {0.5}
    (line,) = [line for line in sent_log.read(session.home) if line.event == "contribution"]
    assert line.body["statistics"] == {"fisher": 77}


def test_consent_that_is_taken_back_before_sending(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    opened = coordinator.open_round(min_contributions=2, merge={"method": "fisher"})
    agreed = SendPolicy(may_send=("fisher",))
    entry = prepare(session, opened, tuned, FACTS, policy=agreed)
    error = refused("push.against_own_policy", lambda: send(session, entry))
    assert error.got == "fisher statistics"
    assert send(session, entry, policy=agreed).state == "sent"


def test_private_tensors_keep_their_statistics_to_themselves(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    opened = coordinator.open_round(min_contributions=2, merge={"method": "fisher"})
    agreed = SendPolicy(may_send=("fisher",), private=("body.small",))
    entry = prepare(session, opened, tuned, FACTS, policy=agreed)
    assert [e.name for e in entry.manifest.tensors] == ["body.large", "body.large.fisher"]
    stricter = SendPolicy(may_send=("fisher",), private=("body.large",))
    error = refused("push.against_own_policy", lambda: send(session, entry, policy=stricter))
    assert error.got == "tensor body.large"


def test_a_statistic_that_was_never_measured(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    coordinator.open_round(min_contributions=2, merge={"method": "regmean"})
    agreed = SendPolicy(may_send=("gram",))
    error = refused(
        "statistics.not_measured", lambda: push(session, "m", tuned, FACTS, policy=agreed)
    )
    assert isinstance(error, NotFoundError)
    assert (error.expected, error.got) == ("gram", "fisher")
    assert not Outbox(session.home).entries()


def test_other_rounds_get_no_statistics(
    coordinator: Coordinator, session: Session, tuned: Path
) -> None:
    coordinator.open_round(min_contributions=2)
    entry = push(session, "m", tuned, FACTS, policy=SendPolicy(may_send=("fisher", "gram")))
    assert entry.manifest.statistics == {}
    assert b"statistics" not in entry.signed.document


def test_what_a_newer_coordinator_adds_to_its_policy_is_not_looked_at() -> None:
    policy = {"merge": {"method": "fisher", "novelty": {"a": 1}}, "tide": "high"}
    assert merge_of(common_pb2.Round(id="r", policy_json=json.dumps(policy))).method == "fisher"
    assert merge_of(common_pb2.Round(id="r")) == MergePolicy()
    broken = {"merge": {"method": "mats", "parameters": {"statistic": "kfac"}}}
    refused(
        "policy.invalid",
        lambda: merge_of(common_pb2.Round(id="r", policy_json=json.dumps(broken))),
    )


@pytest.mark.parametrize("said", ["{", "[]", '{"merge": "ties"}', '{"merge": 1}', "[" * 10_000])
def test_a_policy_that_no_coordinator_sends_is_refused(said: str) -> None:
    refused("push.bad_round_policy", lambda: merge_of(common_pb2.Round(id="r", policy_json=said)))


@pytest.fixture
def fruit(coordinator: Coordinator, tmp_path: Path) -> TrainConfig:
    """A second model at the coordinator, which transformers can load; how to train it."""
    base = write_bert(tmp_path / "base")
    with Store.open(coordinator.folder) as store:
        add_model(store, "fruit", base, ["pooler.*"])
    data = write_texts(tmp_path / "texts", 1)
    settings: dict[str, Any] = {"data": str(data), "max_length": 16, "device": "cpu", "lr": 1e-3}
    return TrainConfig.parse({**settings, "max_examples": 16, "bf16": False})


@pytest.mark.parametrize(
    ("merge", "kind"),
    [
        ({"method": "fisher"}, "fisher"),
        ({"method": "regmean"}, "gram"),
        (TIES, "trim"),
    ],
    ids=["fisher", "regmean", "ties"],
)
def test_a_round_from_training_to_release(
    coordinator: Coordinator,
    session: Session,
    fruit: TrainConfig,
    merge: dict[str, Any],
    kind: str,
) -> None:
    coordinator.open_round("fruit", merge=merge)
    agreed = SendPolicy(may_send=("fisher", "gram"))
    steps: list[Step] = []
    (ended,) = contribute(session, "fruit", Terms(fruit, agreed, tell=steps.append), rounds=1)
    assert ended.state == common_pb2.Round.PUBLISHED, ended.reason
    (found,) = session.contributions("fruit", ended.id)
    vector = stored(coordinator, found.id)
    assert list(vector.statistics) == [kind]
    assert vector.has_statistic("encoder.layer.1.output.dense.weight", kind)
    assert not any("pooler" in key or "classifier" in key for key in vector.specs)


def test_a_round_that_asks_too_much_is_left_before_training(
    coordinator: Coordinator, session: Session, fruit: TrainConfig
) -> None:
    coordinator.open_round("fruit", merge={"method": "regmean"})
    terms = Terms(fruit, SendPolicy(may_send=("fisher",)))
    error = refused(
        "push.statistic_not_allowed", lambda: list(contribute(session, "fruit", terms, rounds=1))
    )
    assert "may_send: [gram]" in str(error.expected)
    assert finished(session.home, pull(session, "fruit")) is None


def test_what_was_trained_without_is_measured_later(
    session: Session, fruit: TrainConfig, coordinator: Coordinator
) -> None:
    base = pull(session, "fruit")
    trained = train(session.home, base, fruit)
    folder = trained.folder / "statistics"
    assert not folder.exists()
    again = train(session.home, base, fruit, statistics={"gram"})
    assert again.folder == trained.folder
    assert json.loads((folder / "statistics.json").read_text())["gram"] > 16
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train(session.home, base, fruit, statistics={"gram"})
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_policy_file_names_what_may_be_sent(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"may_send": ["gram"]}))
    policy = SendPolicy.load(path)
    assert [policy.keeps(kind) for kind in ("fisher", "gram", "trim")] == [True, False, False]
    path.write_text(yaml.safe_dump({"may_send": ["texts"]}))
    error = refused("policy.bad_file", lambda: SendPolicy.load(path))
    assert "may_send" in error.message
