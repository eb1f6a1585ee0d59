"""tokens can be rotated, and tell when they were last used

Old code does not know the secret before a rotation: it refuses it, which costs the grace and nothing else.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def _columns() -> list[sa.Column[Any]]:
    when = sa.DateTime(timezone=True)
    until = "until when the secret before the rotation is good"
    return [
        sa.Column("previous_hash", sa.String(length=64), comment="of the secret before the rotation"),
        sa.Column("previous_until", when, comment=until),
        sa.Column("last_used_at", when, comment="to about a minute"),
    ]


def upgrade() -> None:
    """Apply."""
    for column in _columns():
        op.add_column("tokens", column)


def downgrade() -> None:
    """Undo."""
    for column in reversed(_columns()):
        op.drop_column("tokens", column.name)
