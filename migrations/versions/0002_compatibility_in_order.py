"""indexes that give the compatible versions in the order of their pages

So a page is read from the index and the reading ends with it, however many adapters there are
(`registry.db.queries.compatible_versions`, benchmarks/compatibility.py).
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_index("ix_versions_base_latest", "versions", ["base_id", "latest", "id"], unique=False)
    op.create_index("ix_aliases_base_id_name_version_id", "aliases", ["base_id", "name", "version_id"], unique=False)
    op.drop_index("ix_aliases_base_id_name", table_name="aliases")


def downgrade() -> None:
    """Undo."""
    op.create_index("ix_aliases_base_id_name", "aliases", ["base_id", "name"], unique=False)
    op.drop_index("ix_aliases_base_id_name_version_id", table_name="aliases")
    op.drop_index("ix_versions_base_latest", table_name="versions")
