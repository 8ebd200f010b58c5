"""The tables. ARCHITECTURE.md, "Data model", says what each is for and who writes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Instant(TypeDecorator[datetime]):
    """A UTC time that keeps its zone on databases that would drop it."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(
        self,
        value: datetime | None,
        dialect: Dialect,  # noqa: ARG002 - SQLAlchemy's signature
    ) -> datetime | None:
        """Store UTC; SQLite drops the zone."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(
        self,
        value: datetime | None,
        dialect: Dialect,  # noqa: ARG002 - SQLAlchemy's signature
    ) -> datetime | None:
        """Return UTC with its zone, which SQLite has dropped."""
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Parent of all tables. Constraints have names, so that a later migration can find them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads the class attribute
        datetime: Instant,
        dict[str, Any]: JSON,
        list[Any]: JSON,
        int: BigInteger(),
    }


class Contributor(Base):
    """An enrolled (or invited) organization. The role here is the only one that counts."""

    __tablename__ = "contributor"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str | None]


class Machine(Base):
    """One computer of a contributor, with its own TLS and identity keys."""

    __tablename__ = "machine"
    contributor: Mapped[str] = mapped_column(ForeignKey("contributor.name"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    identity_public_key: Mapped[bytes] = mapped_column(LargeBinary)
    certificate_serial: Mapped[str] = mapped_column(String(64))
    enrolled_at: Mapped[datetime]
    last_seen_at: Mapped[datetime | None]
    client_version: Mapped[str | None] = mapped_column(String(64))
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str | None]

    __table_args__ = (Index("one_machine_per_key", "identity_public_key", unique=True),)


class Invitation(Base):
    """A one-time invitation: only the token's sha256 is kept."""

    __tablename__ = "invitation"
    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    contributor: Mapped[str] = mapped_column(ForeignKey("contributor.name"))
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    machine: Mapped[str | None] = mapped_column(String(64))  # only for this one


class Model(Base):
    """A named lineage of releases."""

    __tablename__ = "model"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    private_patterns: Mapped[list[Any]]
    template: Mapped[dict[str, Any]]  # coldmerge.rounds.policy.RoundTemplate
    last_scheduled_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class Content(Base):
    """What a release or candidate consists of: a list of tensors and files, by digest.

    `listing` is {"tensors": [TensorEntry…], "files": [FileEntry…]}.
    """

    __tablename__ = "content"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    listing: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Master(Base):
    """The fp32 tensors behind a release or candidate: float tensor name → sha256.

    Apart from the content, because two masters may render to the same published bytes:
    bf16 updates too small to show must still add up.
    """

    __tablename__ = "master"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tensors: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class OuterState(Base):
    """What an outer optimizer remembers: `store.states.OuterState`, as JSON. Its blobs are private.

    The round after a release reads the state that the release's record names.
    """

    __tablename__ = "outer_state"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    document: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Blob(Base):
    """A stored tensor or file. `public` ones belong to a release or candidate and may be read."""

    __tablename__ = "blob"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    nbytes: Mapped[int]
    public: Mapped[bool]
    created_at: Mapped[datetime]


class Release(Base):
    """A published release: the signed record is the truth, the columns are for looking it up."""

    __tablename__ = "release"
    model: Mapped[str] = mapped_column(ForeignKey("model.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content_digest: Mapped[str] = mapped_column(ForeignKey("content.digest"), index=True)
    master_digest: Mapped[str] = mapped_column(ForeignKey("master.digest"))
    state_digest: Mapped[str | None] = mapped_column(String(64))
    record: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    published_at: Mapped[datetime]


class Round(Base):
    """A round. `version` is the compare-and-set counter of every transition."""

    __tablename__ = "round"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("model.name"), index=True)
    state: Mapped[str] = mapped_column(String(16))
    active: Mapped[bool]  # True in OPEN, SEALED, MERGING and CANDIDATE
    version: Mapped[int]
    base_number: Mapped[int]
    base_digest: Mapped[str] = mapped_column(String(64))
    policy: Mapped[dict[str, Any]]  # coldmerge.rounds.policy.RoundPolicy, frozen at opening
    probe_seed: Mapped[int]
    opened_at: Mapped[datetime]
    closes_at: Mapped[datetime | None]
    screening: Mapped[dict[str, Any] | None]  # coldmerge.screening: bounds, factors, report
    sealed_inputs: Mapped[list[Any] | None]  # manifest digests, sorted: frozen at SEALED
    trial: Mapped[int] = mapped_column(server_default=text("0"))  # 0: all inputs
    left_out: Mapped[list[Any] | None]  # manifest digests that the trial at hand leaves out
    isolation: Mapped[dict[str, Any] | None]  # coldmerge.rounds.isolation: trials so far
    coefficients: Mapped[dict[str, Any] | None]  # coldmerge.rounds.coefficients.Search
    replay: Mapped[dict[str, Any] | None]  # a re-merge: which rounds, without whose updates
    merge_attempts: Mapped[int]
    candidate_digest: Mapped[str | None] = mapped_column(ForeignKey("content.digest"), index=True)
    candidate_master: Mapped[str | None] = mapped_column(ForeignKey("master.digest"))
    candidate_state: Mapped[str | None] = mapped_column(String(64))
    evaluation_closes_at: Mapped[datetime | None]
    held: Mapped[bool]
    release_number: Mapped[int | None]
    reason: Mapped[str | None]
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        # One active round per model, whoever races to open it.
        Index(
            "one_active_round",
            "model",
            unique=True,
            sqlite_where=text("active"),
            postgresql_where=text("active"),
        ),
    )


class Upload(Base):
    """An open upload. The bytes up to `committed_size` are on disk and fsynced."""

    __tablename__ = "upload"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    manifest_digest: Mapped[str] = mapped_column(String(64), unique=True)
    contributor: Mapped[str] = mapped_column(ForeignKey("contributor.name"))
    machine: Mapped[str] = mapped_column(String(64))
    round: Mapped[str] = mapped_column(ForeignKey("round.id"), index=True)
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    total_size: Mapped[int]
    committed_size: Mapped[int]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime | None]  # when committed_size moved last
    fence: Mapped[int] = mapped_column(server_default=text("0"))  # grows with each writer


class Contribution(Base):
    """An acknowledged contribution: its payload and manifest are durable."""

    __tablename__ = "contribution"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("model.name"))
    round: Mapped[str] = mapped_column(ForeignKey("round.id"), index=True)
    contributor: Mapped[str] = mapped_column(ForeignKey("contributor.name"), index=True)
    manifest_digest: Mapped[str] = mapped_column(String(64), unique=True)
    nonce: Mapped[str] = mapped_column(String(32))
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    payload: Mapped[str] = mapped_column(String(128))  # file name below contributions/
    payload_bytes: Mapped[int]
    examples: Mapped[int]
    norm: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))  # see store.contributions
    reason: Mapped[str | None]  # why it is quarantined or refused
    payload_erased_at: Mapped[datetime | None]
    receipt: Mapped[bytes] = mapped_column(LargeBinary)
    receipt_signature: Mapped[bytes] = mapped_column(LargeBinary)
    accepted_at: Mapped[datetime]

    __table_args__ = (
        UniqueConstraint("contributor", "round", "nonce", name="one_use_of_a_nonce"),
        Index(
            "one_admitted_contribution",
            "round",
            "contributor",
            unique=True,
            sqlite_where=text("state = 'ADMITTED'"),
            postgresql_where=text("state = 'ADMITTED'"),
        ),
    )


class Evaluation(Base):
    """A contributor's signed judgement of a candidate; the last one per trial counts."""

    __tablename__ = "evaluation"
    round: Mapped[str] = mapped_column(ForeignKey("round.id"), primary_key=True)
    trial: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    contributor: Mapped[str] = mapped_column(ForeignKey("contributor.name"), primary_key=True)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    reported_at: Mapped[datetime]


class Lease(Base):
    """Who may work on something now. `fence` grows with each new holder."""

    __tablename__ = "lease"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    fence: Mapped[int]
    expires_at: Mapped[datetime]


class Notice(Base):
    """Something an admin should hear of: delivered to the webhook, retried until it is."""

    __tablename__ = "notice"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    url: Mapped[str]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    attempts: Mapped[int]
    next_attempt_at: Mapped[datetime]
    delivered_at: Mapped[datetime | None]


class AuditHead(Base):
    """How long the audit log is: one row, locked by whoever appends."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    size: Mapped[int]


class AuditLeaf(Base):
    """One event: the canonical bytes of its entry (`coldmerge.audit/1`), by position."""

    __tablename__ = "audit_leaf"
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(64), index=True)
    contributor: Mapped[str | None] = mapped_column(String(64), index=True)
    round: Mapped[str | None] = mapped_column(String(64), index=True)
    at: Mapped[datetime]
    document: Mapped[bytes] = mapped_column(LargeBinary)


class AuditNode(Base):
    """The hash of a complete subtree of the log: 2**level leaves from index * 2**level on."""

    __tablename__ = "audit_node"
    level: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    hash: Mapped[bytes] = mapped_column(LargeBinary(32))

    __table_args__ = (
        # Where a leaf is: proofs are asked for by its hash.
        Index(
            "audit_leaf_hash",
            "hash",
            sqlite_where=text("level = 0"),
            postgresql_where=text("level = 0"),
        ),
    )


class AuditCheckpoint(Base):
    """A signed statement of the log's size and root that somebody was given."""

    __tablename__ = "audit_checkpoint"
    size: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]


class SigningKey(Base):
    """A key that signs receipts, records and checkpoints, named by the one before it."""

    __tablename__ = "signing_key"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    public_key: Mapped[bytes] = mapped_column(LargeBinary)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]


class Usage(Base):
    """What a contributor announced on one day (UTC): the bytes of its uploads."""

    __tablename__ = "usage"
    contributor: Mapped[str] = mapped_column(ForeignKey("contributor.name"), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    received_bytes: Mapped[int]
