"""how many items of a suite are in its calibration split

So that a search is refused when it is asked for, not on a worker. Versions from before have none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_COMMENT = "suites: items in the calibration split, None: not counted yet then"


def upgrade() -> None:
    """Apply."""
    op.add_column("dataset_versions", sa.Column("calibration_rows", sa.Integer(), nullable=True, comment=_COMMENT))


def downgrade() -> None:
    """Undo."""
    op.drop_column("dataset_versions", "calibration_rows")
