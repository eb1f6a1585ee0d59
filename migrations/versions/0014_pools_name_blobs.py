"""what names a blob is found by the blob: answers, papers and labels of pools, too"""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_INDEXED = (("pool_answers", "answers"), ("pool_papers", "paper"), ("pool_papers", "labels"))


def upgrade() -> None:
    """Apply."""
    for table, column in _INDEXED:
        op.create_index(f"ix_{table}_{column}", table, [column])


def downgrade() -> None:
    """Undo."""
    for table, column in reversed(_INDEXED):
        op.drop_index(f"ix_{table}_{column}", table)
