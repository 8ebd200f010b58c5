"""What a round learns of its coefficients."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("round", sa.Column("coefficients", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Undo. Releases keep the coefficients in their records."""
    op.drop_column("round", "coefficients")
