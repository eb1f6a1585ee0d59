"""versions can be yanked, quarantined and deleted; a deleted one keeps its number and digest

The release before gives no standing to what it commits: the database's default does.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_FALLEN = sa.text("status <> 'live'")


def _columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("status", sa.String(12), nullable=False, server_default="live", comment="registry.core.lifecycle"),
        sa.Column("status_reason", sa.Text(), nullable=True, comment="why it was changed last"),
        sa.Column("status_by", sa.String(16), nullable=True, comment="whose token changed it last"),
        sa.Column("status_at", sa.DateTime(timezone=True), nullable=True, comment="when it was changed last"),
    ]


def upgrade() -> None:
    """Apply."""
    for column in _columns():
        op.add_column("versions", column)
    op.create_index("ix_versions_fallen", "versions", ["id"], sqlite_where=_FALLEN, postgresql_where=_FALLEN)


def downgrade() -> None:
    """Undo."""
    op.drop_index("ix_versions_fallen", "versions")
    for column in reversed(_columns()):
        op.drop_column("versions", column.name)
