"""every change of state is written down, in a chain, and the database lets nobody change it

Triggers refuse to change what a row says, to move one that has its place, and to remove any.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_LONG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_START = "sha256:" + "0" * 64
_SAID = ("id", "at", "actor", "namespace", "event", "subject", "reason", "before", "after")
_KEPT = "rows of the audit are only ever added"


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audit",
        sa.Column("id", _LONG, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, comment="when it was done"),
        sa.Column("actor", sa.String(16), nullable=False, comment="the token's id; registry: by itself"),
        sa.Column("namespace", sa.String(64), nullable=True, comment="whose admins may read it"),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(300), nullable=False),
        sa.Column("reason", sa.String(2000), nullable=False),
        sa.Column("before", sa.Text(), nullable=True, comment="canonical JSON"),
        sa.Column("after", sa.Text(), nullable=True, comment="canonical JSON"),
        sa.Column("seq", _LONG, nullable=True, comment="place in the chain, given later"),
        sa.Column("link", sa.String(71), nullable=True, comment="registry.core.audit: ties it to all before it"),
        sa.CheckConstraint("(seq IS NULL) = (link IS NULL)", name=op.f("ck_audit_link")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    waiting = sa.text("seq IS NULL")
    op.create_index("uq_audit_seq", "audit", ["seq"], unique=True)
    op.create_index("ix_audit_waiting", "audit", ["id"], sqlite_where=waiting, postgresql_where=waiting)
    op.create_index("ix_audit_namespace", "audit", ["namespace", "id"])
    op.create_index("ix_audit_subject", "audit", ["subject", "id"])
    head = op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("link", sa.String(71), nullable=False, comment="of the last row that has its place"),
        sa.CheckConstraint("id = 1", name=op.f("ck_audit_head_one")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.bulk_insert(head, [{"id": 1, "seq": 0, "link": _START}])
    if op.get_bind().dialect.name == "postgresql":
        _refuse_in_postgresql()
    else:
        _refuse_in_sqlite()


def _refuse_in_postgresql() -> None:
    changed = " OR ".join(f"OLD.{name} IS DISTINCT FROM NEW.{name}" for name in _SAID)
    op.execute(
        "CREATE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_KEPT}'; END $$"
    )
    for name, when in (
        ("audit_says_on", f"BEFORE UPDATE ON audit FOR EACH ROW WHEN (OLD.seq IS NOT NULL OR {changed})"),
        ("audit_keeps", "BEFORE DELETE ON audit FOR EACH ROW"),
        ("audit_keeps_all", "BEFORE TRUNCATE ON audit FOR EACH STATEMENT"),
    ):
        op.execute(f"CREATE TRIGGER {name} {when} EXECUTE FUNCTION audit_refuses()")


def _refuse_in_sqlite() -> None:
    changed = " OR ".join(f"OLD.{name} IS NOT NEW.{name}" for name in _SAID)
    for name, when in (
        ("audit_says_on", f"BEFORE UPDATE ON audit WHEN OLD.seq IS NOT NULL OR {changed}"),
        ("audit_keeps", "BEFORE DELETE ON audit"),
    ):
        op.execute(f"CREATE TRIGGER {name} {when} BEGIN SELECT RAISE(ABORT, '{_KEPT}'); END")


def downgrade() -> None:
    """Undo."""
    op.drop_table("audit_head")
    op.drop_table("audit")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_refuses()")
