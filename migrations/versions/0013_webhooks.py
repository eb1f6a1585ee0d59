"""addresses that are told what changes, and how far each has been told

What is told is the audit's chain, so there is no other outbox.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=True, comment="None: everything"),
        sa.Column("url", sa.String(2000), nullable=False),
        sa.Column("events", _JSON, nullable=False, comment="beginnings of what it is told; none: all"),
        sa.Column("secret", sa.String(64), nullable=False, comment="signs; must be at hand, so it is kept as it is"),
        sa.Column("cursor", sa.BigInteger(), nullable=False, comment="place in the audit up to which it was told"),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="failures of what is to be told next"),
        sa.Column("due_at", _TIME, nullable=False, comment="when it is tried again"),
        sa.Column("lease_until", _TIME, nullable=True, comment="until when one deliverer owns it"),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_by", sa.String(16), nullable=False),
        sa.Column("created_at", _TIME, nullable=False, comment="when it was added"),
        sa.Column("removed_at", _TIME, nullable=True, comment="from when on it is told nothing"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )


def downgrade() -> None:
    """Undo."""
    op.drop_table("webhooks")
