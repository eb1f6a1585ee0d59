"""unlabelled pools: what versions answered, on what they differ, and the labels that people gave"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "pool_answers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("version", sa.String(length=71), nullable=True, comment="digest of the version; NULL: the bare base"),
        sa.Column("harness", sa.String(length=71), nullable=False, comment="digest of harness, decoding and precision"),
        sa.Column("answers", sa.String(length=71), nullable=False, comment="blob of the answers per input"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when the job succeeded"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_pool_answers_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pool_answers")),
    )
    op.create_index("ix_pool_answers_job_id", "pool_answers", ["job_id"])
    op.create_table(
        "pool_papers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=71), nullable=False, comment="digest of the candidate"),
        sa.Column("paper", sa.String(length=71), nullable=False, comment="blob of the file to be labelled"),
        sa.Column("labels", sa.String(length=71), nullable=True, comment="blob of the labels; NULL: none came yet"),
        sa.Column("actor", sa.String(length=16), nullable=True, comment="the token that labelled it"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when the answers were compared"),
        sa.Column("labelled_at", sa.DateTime(timezone=True), nullable=True, comment="when the labels came"),
        sa.ForeignKeyConstraint(["item_id"], ["campaign_items.id"], name=op.f("fk_pool_papers_item_id_campaign_items")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pool_papers")),
        sa.UniqueConstraint("item_id", "paper", name=op.f("uq_pool_papers_item_id_paper")),
    )


def downgrade() -> None:
    """Undo; blobs of answers and labels stay in the store, and nothing names them."""
    op.drop_table("pool_papers")
    op.drop_table("pool_answers")
