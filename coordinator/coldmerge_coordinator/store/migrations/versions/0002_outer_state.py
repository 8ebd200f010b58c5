"""What outer optimizers remember.

The new columns refer to `outer_state` without a foreign key: SQLite can neither add one to
a table that others refer to, nor drop a column that has one.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "outer_state",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_outer_state")),
    )
    op.add_column("release", sa.Column("state_digest", sa.String(length=64), nullable=True))
    op.add_column("round", sa.Column("candidate_state", sa.String(length=64), nullable=True))


def downgrade() -> None:
    """Undo. Releases keep their records, which name a state that is then unknown."""
    op.drop_column("round", "candidate_state")
    op.drop_column("release", "state_digest")
    op.drop_table("outer_state")
