"""The audit log: entries come with the transaction that decided, in order, under one root."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import func, select

from coldmerge.core.errors import IntegrityError
from coldmerge.core.evidence import MAX_TEXT, AuditEntry
from coldmerge.core.merkle import Frontier, merkle_root
from coldmerge_coordinator import audit
from coldmerge_coordinator.config import CoordinatorConfig
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import AuditHead, AuditLeaf, AuditNode

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "hub", CoordinatorConfig(federation="fed")) as made:
        yield made


def log(store: Store, kind: str = "round.opened", **detail: audit.Scalar) -> None:
    with store.database.write() as session:
        audit.append(session, kind, "local admin", NOW, ids={"round": "r"}, detail=detail)


def leaves(store: Store) -> list[bytes]:
    with store.database.read() as session:
        query = select(AuditLeaf).order_by(AuditLeaf.position)
        found = list(session.scalars(query))
        head = session.get_one(AuditHead, 1)
        assert [row.position for row in found] == list(range(head.size))
        assert Frontier.of(head.size, audit.subtree_of(session)).root().hex() == merkle_root(
            row.document for row in found
        )
    return [row.document for row in found]


def test_entries_are_numbered_in_order_and_hashed(store: Store) -> None:
    for number in range(21):
        log(store, number=number)
    entries = [AuditEntry.parse(raw) for raw in leaves(store)]
    assert entries[0].kind == audit.BEGUN
    assert [entry.detail["number"] for entry in entries[1:]] == list(range(21))
    assert [entry.position for entry in entries] == list(range(22))
    assert {entry.federation for entry in entries} == {"fed"}
    assert entries[1].ids == {"round": "r"}
    assert entries[1].actor == "local admin"


def test_entries_of_one_transaction_stay_together_and_in_order(store: Store) -> None:
    with store.database.write() as session:
        for kind in ("round.sealed", "round.merged", "round.published"):
            audit.append(session, kind, "coordinator", NOW)
    kinds = [AuditEntry.parse(raw).kind for raw in leaves(store)]
    assert kinds == [audit.BEGUN, "round.sealed", "round.merged", "round.published"]


def test_what_is_rolled_back_was_never_logged(store: Store) -> None:
    log(store)

    def fail() -> None:
        with store.database.write() as session:
            audit.append(session, "round.sealed", "coordinator", NOW)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    log(store)
    assert [AuditEntry.parse(raw).kind for raw in leaves(store)] == [
        audit.BEGUN,
        "round.opened",
        "round.opened",
    ]


def test_nothing_long_gets_in(store: Store) -> None:
    log(store, reason="x" * 10_000)
    entry = AuditEntry.parse(leaves(store)[-1])
    assert len(str(entry.detail["reason"])) == MAX_TEXT


def test_writers_at_the_same_time_share_one_sequence(store: Store) -> None:
    threads = [threading.Thread(target=log, args=(store,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leaves(store)) == 13


def test_the_nodes_are_few_and_a_hole_is_noticed(store: Store) -> None:
    for _ in range(16):
        log(store)
    with store.database.write() as session:
        count = session.scalar(select(func.count()).select_from(AuditNode))
        assert count == 17 + 8 + 4 + 2 + 1
        session.delete(session.get_one(AuditNode, (4, 0)))
    with pytest.raises(IntegrityError) as caught:
        log(store)
    assert caught.value.code == "audit.no_node"
