"""jobs and campaigns know what asked for them, for logs and traces; secrets of webhooks may be sealed"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

_ASKED = (
    ("origin", sa.String(64), "id of the request, or of the schedule, that asked for it"),
    ("traceparent", sa.String(55), "where that was in a trace (W3C)"),
)


def upgrade() -> None:
    """Apply."""
    for table in ("jobs", "campaigns"):
        for name, kind, comment in _ASKED:
            op.add_column(table, sa.Column(name, kind, nullable=True, comment=comment))
    comment = "the secret, encrypted; then `secret` is empty"
    op.add_column("webhooks", sa.Column("sealed", sa.Text(), nullable=True, comment=comment))


def downgrade() -> None:
    """Undo."""
    op.drop_column("webhooks", "sealed")
    for table in ("campaigns", "jobs"):
        for name, _, _ in reversed(_ASKED):
            op.drop_column(table, name)
