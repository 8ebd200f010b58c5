"""Audit log, signing keys, usage; screening, trials and re-merges of rounds; fences of uploads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_INSTANT = sa.DateTime(timezone=True)
_EVALUATION = "round, contributor, document, signature, reported_at"


def _columns() -> list[tuple[str, sa.Column[object]]]:
    """Table by table, what they get."""
    return [
        ("invitation", sa.Column("machine", sa.String(64), nullable=True)),
        ("machine", sa.Column("revoked_reason", sa.String(), nullable=True)),
        ("round", sa.Column("screening", sa.JSON(), nullable=True)),
        ("round", _counter("trial")),
        ("round", sa.Column("left_out", sa.JSON(), nullable=True)),
        ("round", sa.Column("isolation", sa.JSON(), nullable=True)),
        ("round", sa.Column("replay", sa.JSON(), nullable=True)),
        ("upload", sa.Column("updated_at", _INSTANT, nullable=True)),
        ("upload", _counter("fence")),
        ("contribution", sa.Column("reason", sa.String(), nullable=True)),
        ("contribution", sa.Column("payload_erased_at", _INSTANT, nullable=True)),
    ]


def _counter(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False)


def upgrade() -> None:
    """Apply."""
    for table, column in _columns():
        op.add_column(table, column)
    op.create_index("one_machine_per_key", "machine", ["identity_public_key"], unique=True)
    _rebuild_evaluation(trials=True)
    op.create_table(
        "audit_head",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.execute("INSERT INTO audit_head (id, size) VALUES (1, 0)")
    op.create_table(
        "audit_leaf",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("contributor", sa.String(length=64), nullable=True),
        sa.Column("round", sa.String(length=64), nullable=True),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_audit_leaf")),
    )
    for name in ("kind", "contributor", "round"):
        op.create_index(op.f(f"ix_audit_leaf_{name}"), "audit_leaf", [name], unique=False)
    op.create_table(
        "audit_node",
        sa.Column("level", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.PrimaryKeyConstraint("level", "index", name=op.f("pk_audit_node")),
    )
    op.create_index(
        "audit_leaf_hash",
        "audit_node",
        ["hash"],
        unique=False,
        sqlite_where=sa.text("level = 0"),
        postgresql_where=sa.text("level = 0"),
    )
    op.create_table(
        "audit_checkpoint",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("size", name=op.f("pk_audit_checkpoint")),
    )
    op.create_table(
        "signing_key",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_signing_key")),
    )
    op.create_table(
        "usage",
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("received_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_usage_contributor")
        ),
        sa.PrimaryKeyConstraint("contributor", "day", name=op.f("pk_usage")),
    )


def _rebuild_evaluation(*, trials: bool) -> None:
    """Make the table anew, since SQLite cannot change a primary key: trial 0 has what was there."""
    op.execute(f"CREATE TABLE evaluation_kept AS SELECT {_EVALUATION} FROM evaluation")  # noqa: S608
    op.drop_table("evaluation")
    trial = [sa.Column("trial", sa.BigInteger(), autoincrement=False, nullable=False)]
    op.create_table(
        "evaluation",
        sa.Column("round", sa.String(length=64), nullable=False),
        *(trial if trials else []),
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("reported_at", _INSTANT, nullable=False),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_evaluation_contributor")
        ),
        sa.ForeignKeyConstraint(["round"], ["round.id"], name=op.f("fk_evaluation_round")),
        sa.PrimaryKeyConstraint(
            "round", *(["trial"] if trials else []), "contributor", name=op.f("pk_evaluation")
        ),
    )
    names, values = (
        (f"trial, {_EVALUATION}", f"0, {_EVALUATION}") if trials else (_EVALUATION, _EVALUATION)
    )
    op.execute(f"INSERT INTO evaluation ({names}) SELECT {values} FROM evaluation_kept")  # noqa: S608
    op.drop_table("evaluation_kept")


def downgrade() -> None:
    """Undo. The audit log goes, and of the trials' evaluations only the first trial's stay."""
    for table in (
        "usage",
        "signing_key",
        "audit_checkpoint",
        "audit_node",
        "audit_leaf",
        "audit_head",
    ):
        op.drop_table(table)
    op.execute("DELETE FROM evaluation WHERE trial <> 0")
    _rebuild_evaluation(trials=False)
    op.drop_index("one_machine_per_key", "machine")
    for table, column in reversed(_columns()):
        op.drop_column(table, column.name)
