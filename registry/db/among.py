"""Whether a column is one of many values, in a statement whose text is the same for any number of them.

``column IN (…)`` spells every value, so that such a statement is written, read and planned anew for every number of
values. Here the values are one parameter: an array on PostgreSQL, JSON on SQLite. So a statement can be built once.
"""

import json
from collections.abc import Collection
from typing import Any, cast

from sqlalchemy import ARRAY, Boolean, ColumnElement, Dialect, SQLColumnExpression, String, TypeDecorator, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine


class _Values(TypeDecorator[Collection[Any]]):
    """Values of a type, as one parameter."""

    impl = String
    cache_ok = True

    def __init__(self, of: TypeEngine[Any]) -> None:
        super().__init__()
        self.of = of

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name != "postgresql":
            return dialect.type_descriptor(String())
        text = self.of._type_affinity is String  # of any length: a cast to a shorter one would cut it
        return dialect.type_descriptor(ARRAY(String() if text else self.of))

    def process_bind_param(self, value: Collection[Any] | None, dialect: Dialect) -> list[Any] | str | None:
        if value is None:
            return None
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value))


class _Among(FunctionElement[bool]):
    inherit_cache = True
    type = Boolean()

    def self_group(self, against: Any = None) -> Any:  # noqa: ARG002  # SQLAlchemy's name
        """A condition already: SQLite, told ``… = 1``, would look for it in no index."""
        return self


def among(column: SQLColumnExpression[Any], name: str) -> ColumnElement[bool]:
    """The condition that ``column`` is one of the values (integers or text) that the statement gets as ``name``."""
    of = cast(ColumnElement[Any], column).type
    return _Among(column, bindparam(name, type_=_Values(of)))


@compiles(_Among, "postgresql")
def _array(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} = ANY({values})"


@compiles(_Among, "sqlite")
def _json(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({values}))"  # noqa: S608  # no value is in it
