"""the newest checkpoint of a job that storage holds

So that another worker goes on where the disk of a dead one is gone (docs/adr/0014).
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "checkpoints",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="that sent it, holding the lease"),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="steps that its runs have made together"),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="sha256 of the canonical list of its files"),
        sa.Column("size", sa.BigInteger(), nullable=False, comment="bytes of all files"),
        sa.Column("files", _JSON, nullable=False, comment="path, size and sha256 of each file"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was recorded"),
        sa.CheckConstraint("size >= 0", name=op.f("ck_checkpoints_size")),
        sa.CheckConstraint("step >= 1", name=op.f("ck_checkpoints_step")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_checkpoints")),
    )


def downgrade() -> None:
    """Undo."""
    op.drop_table("checkpoints")
