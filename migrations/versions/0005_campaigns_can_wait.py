"""campaigns can be paused, bounded and taken back, and what they decide is kept

A paused campaign's jobs are held; an alias that a campaign set where there was none can be taken away again; every
decision has a row in the ledger (`registry.core.ledger`).
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


_AWAY = "NULL: the alias was taken away"


def _columns() -> list[tuple[str, sa.Column[Any]]]:
    when = sa.DateTime(timezone=True)
    held = "the paused campaign that keeps it from being claimed"
    return [
        ("campaigns", sa.Column("parallel", sa.Integer(), comment="adapters worked on at once; NULL: all")),
        ("campaigns", sa.Column("budget_seconds", sa.Float(), comment="device seconds of all its jobs")),
        ("campaigns", sa.Column("deadline", when, comment="what is not final by then is frozen")),
        ("campaigns", sa.Column("paused_at", when, comment="since when it is paused")),
        ("jobs", sa.Column("held_by", sa.String(length=32), comment=held)),
    ]


def upgrade() -> None:
    """Apply."""
    for table, column in _columns():
        op.add_column(table, column)
    with op.batch_alter_table("alias_moves") as moves:
        moves.alter_column("to_version_id", existing_type=sa.Integer(), nullable=True, comment=_AWAY)
    op.create_table(
        "decisions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("campaign_id", sa.String(length=32), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=True),
        sa.Column("alias", sa.String(length=64), nullable=True),
        sa.Column("kind", sa.String(length=12), nullable=False, comment="registry.core.ledger"),
        sa.Column("tier", sa.String(length=12), nullable=True),
        sa.Column("data", _JSON, nullable=False, comment="what the decision rested on"),
        sa.Column("actor", sa.String(length=16), nullable=True, comment="the token; NULL: by itself"),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, comment="when it was made"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_decisions_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_decisions_campaign_id_campaigns")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_decisions")),
    )
    op.create_index("ix_decisions_adapter_id", "decisions", ["adapter_id", "id"])
    op.create_index("ix_decisions_campaign_id", "decisions", ["campaign_id", "id"])
    op.create_index("ix_decisions_tier", "decisions", ["tier", "id"])


def downgrade() -> None:
    """Undo; what was taken away has no row in the schema before."""
    op.drop_table("decisions")
    op.execute("DELETE FROM alias_moves WHERE to_version_id IS NULL")
    with op.batch_alter_table("alias_moves") as moves:
        moves.alter_column("to_version_id", existing_type=sa.Integer(), nullable=False, comment=None)
    for table, column in reversed(_columns()):
        op.drop_column(table, column.name)
