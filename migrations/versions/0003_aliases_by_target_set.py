"""aliases know the target set of what they point at

Compatible versions under an alias are then one index range per (base, target set), as they are without an alias
(`registry.db.queries.compatible_versions`, benchmarks/compatibility.py).
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_KEY = "fk_aliases_target_set_id_target_sets"
_COMMENT = "the version's, so that compatible ones are one index range"


def upgrade() -> None:
    """Apply."""
    with op.batch_alter_table("aliases") as table:
        table.add_column(sa.Column("target_set_id", sa.Integer(), nullable=True, comment=_COMMENT))
        table.create_foreign_key(_KEY, "target_sets", ["target_set_id"], ["id"])
    op.execute(
        "UPDATE aliases SET target_set_id ="
        " (SELECT target_set_id FROM versions WHERE versions.id = aliases.version_id)"
    )
    op.create_index(
        "ix_aliases_base_name_target_set_version", "aliases", ["base_id", "name", "target_set_id", "version_id"]
    )


def downgrade() -> None:
    """Undo."""
    op.drop_index("ix_aliases_base_name_target_set_version", table_name="aliases")
    with op.batch_alter_table("aliases") as table:
        table.drop_constraint(_KEY, type_="foreignkey")
        table.drop_column("target_set_id")
