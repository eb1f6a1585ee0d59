"""versions are signed: the keys that a namespace trusts, what they signed, and whether a signature is required"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_NOT_AGAIN = "from when on nothing that it signed counts"


def upgrade() -> None:
    """Apply."""
    required: sa.Column[bool] = sa.Column(
        "require_signature", sa.Boolean(), nullable=False, server_default=sa.false(),
        comment="whether only signed versions are given by alias",
    )  # fmt: skip
    op.add_column("namespaces", required)
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("fingerprint", sa.String(71), nullable=False, comment="sha256 of the public key's PEM"),
        sa.Column("name", sa.String(200), nullable=False, comment="whose it is, for people"),
        sa.Column("public", sa.Text(), nullable=False, comment="PEM"),
        sa.Column("created_by", sa.String(16), nullable=False),
        sa.Column("created_at", _TIME, nullable=False, comment="when it was added"),
        sa.Column("revoked_at", _TIME, nullable=True, comment=_NOT_AGAIN),
        sa.Column("revoked_by", sa.String(16), nullable=True),
        sa.Column("revoked_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signing_keys")),
        sa.UniqueConstraint("namespace", "fingerprint", name=op.f("uq_signing_keys_namespace_fingerprint")),
    )
    op.create_table(
        "signatures",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("key_id", sa.Integer(), nullable=False),
        sa.Column("bundle", sa.LargeBinary(), nullable=False, comment="registry.core.signatures, as JSON"),
        sa.Column("created_by", sa.String(16), nullable=False),
        sa.Column("created_at", _TIME, nullable=False, comment="when it came"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_signatures_version_id_versions")),
        sa.ForeignKeyConstraint(["key_id"], ["signing_keys.id"], name=op.f("fk_signatures_key_id_signing_keys")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signatures")),
        sa.UniqueConstraint("version_id", "key_id", name=op.f("uq_signatures_version_id_key_id")),
    )
    op.create_index("ix_signatures_key_id", "signatures", ["key_id"])


def downgrade() -> None:
    """Undo."""
    op.drop_table("signatures")
    op.drop_table("signing_keys")
    op.drop_column("namespaces", "require_signature")
