"""blobs that nothing names are collected, lost ones can be brought again; namespaces have bounds

`holds` keeps the collector off while a backup copies.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_UNNAMED, _MISSING = sa.text("unnamed_since IS NOT NULL"), sa.text("missing_since IS NOT NULL")
_SINCE = "since when nothing names it, as far as the collector saw"
_LOST = "since when its bytes are known to be lost; a push brings them"
_KEEP = "days that unreferenced versions are kept; None: for ever"


def upgrade() -> None:
    """Apply."""
    op.add_column("blobs", sa.Column("unnamed_since", _TIME, nullable=True, comment=_SINCE))
    op.add_column("blobs", sa.Column("missing_since", _TIME, nullable=True, comment=_LOST))
    for name, where in (("unnamed_since", _UNNAMED), ("missing_since", _MISSING)):
        op.create_index(f"ix_blobs_{name}", "blobs", [name], sqlite_where=where, postgresql_where=where)
    op.create_index("ix_push_blobs_digest", "push_blobs", ["digest"])
    op.create_index("ix_evaluations_records", "evaluations", ["records"])
    op.create_table(
        "holds",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("until", _TIME, nullable=False, comment="when it ends by itself"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holds")),
    )
    op.create_table(
        "namespaces",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("quota_bytes", sa.BigInteger(), nullable=True, comment="None: no bound"),
        sa.Column("keep_days", sa.Integer(), nullable=True, comment=_KEEP),
        sa.CheckConstraint("quota_bytes >= 0", name=op.f("ck_namespaces_quota_bytes")),
        sa.CheckConstraint("keep_days >= 1", name=op.f("ck_namespaces_keep_days")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_namespaces")),
    )


def downgrade() -> None:
    """Undo."""
    op.drop_table("namespaces")
    op.drop_table("holds")
    op.drop_index("ix_evaluations_records", "evaluations")
    op.drop_index("ix_push_blobs_digest", "push_blobs")
    for name in ("missing_since", "unnamed_since"):
        op.drop_index(f"ix_blobs_{name}", "blobs")
        op.drop_column("blobs", name)
