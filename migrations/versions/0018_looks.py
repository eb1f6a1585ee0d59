"""pushes count how often their verification came to no end, and open uploads are found among all that was ever sent"""

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
    there = sa.text("upload_id IS NOT NULL")
    op.create_index(
        "ix_push_blobs_upload_id", "push_blobs", ["upload_id"], postgresql_where=there, sqlite_where=there
    )


def downgrade() -> None:
    """Undo."""
    op.drop_index("ix_push_blobs_upload_id", table_name="push_blobs")
    op.drop_column("pushes", "looks")
