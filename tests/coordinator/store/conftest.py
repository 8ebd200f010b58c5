"""A real coordinator's folder, with a model, its first release and contributors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy.orm import Session

from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, Signed, TensorEntry, sign
from coldmerge.core.ids import new_id
from coldmerge.rounds import state
from coldmerge.rounds.policy import RoundPolicy, RoundTemplate
from coldmerge_coordinator.config import CoordinatorConfig
from coldmerge_coordinator.store import Store, releases, rounds
from coldmerge_coordinator.store.models import Contribution, Contributor, Model, Round
from tests.backends import coordinator_config
from tests.support import evaluation

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A laid out, otherwise empty coordinator."""
    folder = tmp_path / "hub"
    Store.create(folder, CoordinatorConfig(federation="fed", **coordinator_config())).close()
    (folder / "keys").mkdir(mode=0o700)
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    path = folder / "keys" / "signing.key"
    path.touch(mode=0o600)
    path.write_bytes(pem)
    return folder


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with Store.open(folder) as store:
        yield store


def add_content(store: Store, session: Session, seed: int) -> tuple[str, str]:
    """Content of one bf16 tensor and one file, made up from `seed`."""
    raw, master = bytes([seed]) * 4, bytes([seed]) * 8
    sha256, nbytes = store.blobs.put(raw)
    config, size = store.blobs.put(b"{}")
    master_sha256, _ = store.blobs.put(master)
    tensor = TensorEntry(name="body.w", dtype="BF16", shape=(2,), sha256=sha256, nbytes=nbytes)
    content = Content((tensor,), (FileEntry(path="config.json", size=size, sha256=config),))
    return releases.add_content(session, content, {"body.w": master_sha256}, NOW)


@pytest.fixture
def content(store: Store) -> Callable[[Session, int], tuple[str, str]]:
    """Makes durable content: (content digest, master digest)."""
    return lambda session, seed: add_content(store, session, seed)


@pytest.fixture
def model(store: Store) -> str:
    """The model `triage` with release 0, and contributors a to e."""
    with store.database.write() as session:
        session.add(
            Model(
                name="triage",
                private_patterns=["head.*"],
                template=RoundTemplate().to_json(),
                created_at=NOW,
            )
        )
        session.add_all(Contributor(name=n, role="contributor", created_at=NOW) for n in "abcde")
        session.flush()
        digests = add_content(store, session, 0)
        releases.publish(
            session, store.signer, "triage", *digests, NOW, recipe={"method": "import"}
        )
    return "triage"


@pytest.fixture
def open_round(store: Store, model: str) -> Callable[..., str]:
    """Opens a round: its id."""

    def run(policy: RoundPolicy | None = None) -> str:
        with store.database.write() as session:
            policy = policy or RoundPolicy(min_contributions=2)
            return rounds.open_round(session, model, policy, NOW).id

    return run


def admit(session: Session, round_id: str, contributor: str) -> None:
    """A made-up contribution, admitted."""
    digest = hashlib.sha256(f"{round_id} {contributor}".encode()).hexdigest()
    session.add(
        Contribution(
            id=new_id("contribution"),
            model="triage",
            round=round_id,
            contributor=contributor,
            manifest_digest=digest,
            nonce=os.urandom(16).hex(),
            manifest=b"{}",
            signature=b"",
            payload="x.safetensors",
            payload_bytes=8,
            examples=10,
            norm=1.0,
            state="ADMITTED",
            receipt=b"{}",
            receipt_signature=b"",
            accepted_at=NOW,
        )
    )
    session.flush()


@pytest.fixture
def contribute(store: Store) -> Callable[[str, str], None]:
    """Admits a contribution and tells the round."""

    def run(round_id: str, contributor: str) -> None:
        with store.database.write() as session:
            row = rounds.get(session, round_id, lock=True)
            admit(session, round_id, contributor)
            rounds.apply(session, row, state.Contributed(), NOW, store.signer)

    return run


@pytest.fixture
def send(store: Store) -> Callable[..., tuple[state.Effect, ...]]:
    """Applies an event in a transaction of its own."""

    def run(
        round_id: str, event: state.Event, after: timedelta = timedelta(0)
    ) -> tuple[state.Effect, ...]:
        with store.database.write() as session:
            row = rounds.get(session, round_id, lock=True)
            return rounds.apply(session, row, event, NOW + after, store.signer)

    return run


@pytest.fixture
def look(store: Store) -> Callable[[str], Round]:
    """The round as it is in the database."""

    def run(round_id: str) -> Round:
        with store.database.read() as session:
            return rounds.get(session, round_id)

    return run


@pytest.fixture
def candidate(
    store: Store,
    open_round: Callable[..., str],
    contribute: Callable[[str, str], None],
    send: Callable[..., object],
) -> Callable[..., str]:
    """A round of a and b that reached CANDIDATE (or beyond, without a gate)."""

    def run(policy: RoundPolicy | None = None, seed: int = 1) -> str:
        round_id = open_round(policy)
        contribute(round_id, "a")
        contribute(round_id, "b")
        send(round_id, state.MergeStarted())
        with store.database.write() as session:
            digests = add_content(store, session, seed)
            row = rounds.get(session, round_id, lock=True)
            rounds.apply(session, row, state.MergeDone(*digests), NOW, store.signer)
        return round_id

    return run


@pytest.fixture
def judgement(look: Callable[[str], Round]) -> Callable[..., Signed]:
    """A signed evaluation: judgement(round id, contributor, points gained)."""

    def run(round_id: str, contributor: str, points: int) -> Signed:
        judged = evaluation(look(round_id), contributor, NOW, points, "fed")
        return sign(judged, Ed25519PrivateKey.generate())

    return run
