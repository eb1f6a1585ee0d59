"""pushes may be opened before all digests are known

A push remembers the draft that it was opened with, a blob the path by which its bytes were staged (docs/adr/0019).
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    said = "digest of the draft it was opened with; it is the manifest's until the seal"
    op.add_column("pushes", sa.Column("draft", sa.String(length=71), comment=said))
    op.create_index("ix_pushes_draft", "pushes", ["draft"], unique=False)
    op.add_column("push_blobs", sa.Column("path", sa.Text(), comment="of a file that was opened without digest"))


def downgrade() -> None:
    """Undo."""
    op.drop_column("push_blobs", "path")
    op.drop_index("ix_pushes_draft", table_name="pushes")
    op.drop_column("pushes", "draft")
