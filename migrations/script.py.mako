"""${message}

A migration may only do what the code of the release before it survives: add tables, nullable columns,
indexes. It may not drop or rename what that code reads, rewrite large tables in one statement, or import
models. Contract in a later release.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Apply."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Take back."""
    ${downgrades if downgrades else "pass"}
