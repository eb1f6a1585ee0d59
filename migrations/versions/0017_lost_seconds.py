"""jobs know what their attempts without a result took, and in what company the last one is made"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    comment = "jobs that the last attempt is made with, itself too"
    op.add_column("jobs", sa.Column("company", sa.Integer(), nullable=False, server_default="1", comment=comment))
    comment = "device seconds of attempts without a result"
    op.add_column("jobs", sa.Column("lost_seconds", sa.Float(), nullable=False, server_default="0", comment=comment))


def downgrade() -> None:
    """Undo."""
    op.drop_column("jobs", "lost_seconds")
    op.drop_column("jobs", "company")
