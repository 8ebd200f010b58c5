"""Initial tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "blob",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_blob")),
    )
    op.create_table(
        "content",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("listing", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_content")),
    )
    op.create_table(
        "contributor",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_reason", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_contributor")),
    )
    op.create_table(
        "lease",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_lease")),
    )
    op.create_table(
        "master",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("tensors", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_master")),
    )
    op.create_table(
        "model",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("private_patterns", sa.JSON(), nullable=False),
        sa.Column("template", sa.JSON(), nullable=False),
        sa.Column("last_scheduled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_model")),
    )
    op.create_table(
        "notice",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notice")),
    )
    op.create_table(
        "invitation",
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_invitation_contributor")
        ),
        sa.PrimaryKeyConstraint("token_sha256", name=op.f("pk_invitation")),
    )
    op.create_table(
        "machine",
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("identity_public_key", sa.LargeBinary(), nullable=False),
        sa.Column("certificate_serial", sa.String(length=64), nullable=False),
        sa.Column("enrolled_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("client_version", sa.String(length=64), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_machine_contributor")
        ),
        sa.PrimaryKeyConstraint("contributor", "name", name=op.f("pk_machine")),
    )
    op.create_table(
        "release",
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("content_digest", sa.String(length=64), nullable=False),
        sa.Column("master_digest", sa.String(length=64), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["content_digest"], ["content.digest"], name=op.f("fk_release_content_digest")
        ),
        sa.ForeignKeyConstraint(
            ["master_digest"], ["master.digest"], name=op.f("fk_release_master_digest")
        ),
        sa.ForeignKeyConstraint(["model"], ["model.name"], name=op.f("fk_release_model")),
        sa.PrimaryKeyConstraint("model", "number", name=op.f("pk_release")),
    )
    op.create_index(op.f("ix_release_content_digest"), "release", ["content_digest"], unique=False)

    op.create_table(
        "round",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("base_number", sa.BigInteger(), nullable=False),
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("probe_seed", sa.BigInteger(), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closes_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sealed_inputs", sa.JSON(), nullable=True),
        sa.Column("merge_attempts", sa.BigInteger(), nullable=False),
        sa.Column("candidate_digest", sa.String(length=64), nullable=True),
        sa.Column("candidate_master", sa.String(length=64), nullable=True),
        sa.Column("evaluation_closes_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("held", sa.Boolean(), nullable=False),
        sa.Column("release_number", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["candidate_digest"], ["content.digest"], name=op.f("fk_round_candidate_digest")
        ),
        sa.ForeignKeyConstraint(
            ["candidate_master"], ["master.digest"], name=op.f("fk_round_candidate_master")
        ),
        sa.ForeignKeyConstraint(["model"], ["model.name"], name=op.f("fk_round_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_round")),
    )
    op.create_index(op.f("ix_round_candidate_digest"), "round", ["candidate_digest"], unique=False)
    op.create_index(op.f("ix_round_model"), "round", ["model"], unique=False)
    op.create_index(
        "one_active_round",
        "round",
        ["model"],
        unique=True,
        sqlite_where=sa.text("active"),
        postgresql_where=sa.text("active"),
    )

    op.create_table(
        "contribution",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("round", sa.String(length=64), nullable=False),
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("manifest_digest", sa.String(length=64), nullable=False),
        sa.Column("nonce", sa.String(length=32), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.String(length=128), nullable=False),
        sa.Column("payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("examples", sa.BigInteger(), nullable=False),
        sa.Column("norm", sa.Double(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=False),
        sa.Column("receipt_signature", sa.LargeBinary(), nullable=False),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_contribution_contributor")
        ),
        sa.ForeignKeyConstraint(["model"], ["model.name"], name=op.f("fk_contribution_model")),
        sa.ForeignKeyConstraint(["round"], ["round.id"], name=op.f("fk_contribution_round")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_contribution")),
        sa.UniqueConstraint("contributor", "round", "nonce", name="one_use_of_a_nonce"),
        sa.UniqueConstraint("manifest_digest", name=op.f("uq_contribution_manifest_digest")),
    )
    op.create_index(
        op.f("ix_contribution_contributor"), "contribution", ["contributor"], unique=False
    )
    op.create_index(op.f("ix_contribution_round"), "contribution", ["round"], unique=False)
    op.create_index(
        "one_admitted_contribution",
        "contribution",
        ["round", "contributor"],
        unique=True,
        sqlite_where=sa.text("state = 'ADMITTED'"),
        postgresql_where=sa.text("state = 'ADMITTED'"),
    )

    op.create_table(
        "evaluation",
        sa.Column("round", sa.String(length=64), nullable=False),
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_evaluation_contributor")
        ),
        sa.ForeignKeyConstraint(["round"], ["round.id"], name=op.f("fk_evaluation_round")),
        sa.PrimaryKeyConstraint("round", "contributor", name=op.f("pk_evaluation")),
    )
    op.create_table(
        "upload",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("manifest_digest", sa.String(length=64), nullable=False),
        sa.Column("contributor", sa.String(length=64), nullable=False),
        sa.Column("machine", sa.String(length=64), nullable=False),
        sa.Column("round", sa.String(length=64), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("total_size", sa.BigInteger(), nullable=False),
        sa.Column("committed_size", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["contributor"], ["contributor.name"], name=op.f("fk_upload_contributor")
        ),
        sa.ForeignKeyConstraint(["round"], ["round.id"], name=op.f("fk_upload_round")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload")),
        sa.UniqueConstraint("manifest_digest", name=op.f("uq_upload_manifest_digest")),
    )
    op.create_index(op.f("ix_upload_round"), "upload", ["round"], unique=False)


def downgrade() -> None:
    """Take back."""
    op.drop_table("upload")
    op.drop_table("evaluation")
    op.drop_table("contribution")
    op.drop_table("round")
    op.drop_table("release")
    op.drop_table("machine")
    op.drop_table("invitation")
    op.drop_table("notice")
    op.drop_table("model")
    op.drop_table("master")
    op.drop_table("lease")
    op.drop_table("contributor")
    op.drop_table("content")
    op.drop_table("blob")
