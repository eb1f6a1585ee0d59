"""Alembic's entry: runs migrations on the connection that `registry.db.migrate` hands over."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, DateTime
from sqlmodel import AutoString, SQLModel

import registry.db.models


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """Plain SQLAlchemy types in migrations: they must not depend on code that changes later."""
    if kind != "type":
        return False
    if isinstance(item, registry.db.models.UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if isinstance(item, JSON):
        autogen.imports.add("from sqlalchemy.dialects.postgresql import JSONB")
        return 'sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")'
    if isinstance(item, AutoString):
        return f"sa.String(length={item.length})" if item.length else "sa.String()"
    return False


def compare_type(_context: Any, _column: Any, _wanted_column: Any, found: Any, wanted: Any) -> bool | None:
    """A UtcDateTime is stored as a plain DateTime; everything else as Alembic decides."""
    return False if isinstance(wanted, registry.db.models.UtcDateTime) and isinstance(found, DateTime) else None


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    compare_type=compare_type,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
