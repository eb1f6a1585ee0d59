"""pushes count how often their verification came to no end, so that one that kills verifiers is given up"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    comment = "times that a verifier took it and came to no end"
    op.add_column("pushes", sa.Column("looks", sa.Integer(), nullable=False, server_default="0", comment=comment))


def downgrade() -> None:
    """Undo."""
    op.drop_column("pushes", "looks")
