"""Routes of datasets and suites: lists and single versions; they come by pushes."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from registry.schemas import DatasetInfo, Page
from registry.services import datasets

from .deps import Parts, User
from .pages import Limit, behind, cursor


def _routes(kind: Literal["dataset", "suite"]) -> APIRouter:
    made = APIRouter(prefix=f"/v1/{kind}s", tags=["datasets"])

    @made.get("", operation_id=f"list_{kind}s")
    def listed(
        parts: Parts,
        caller: User,
        limit: Limit = 50,
        after: Annotated[str | None, Query(alias="cursor")] = None,
    ) -> Page[DatasetInfo]:
        """The newest version of every series."""
        (last,) = behind(after, (0,))
        with parts.database.read() as session:
            rows = datasets.page(session, caller, kind, after=last, limit=limit)
            more = cursor(rows[-1].id) if len(rows) == limit else None
            return Page(items=datasets.infos(session, rows), cursor=more)

    @made.get("/{namespace}/{name}", operation_id=f"show_{kind}")
    def show(namespace: str, name: str, parts: Parts, caller: User) -> DatasetInfo:
        """One version: ``name`` is its newest, ``name@vN`` or ``name@sha256:…`` that one."""
        with parts.database.read() as session:
            return datasets.show(session, caller, kind, f"{namespace}/{name}")

    return made


router = APIRouter()
router.include_router(_routes("dataset"))
router.include_router(_routes("suite"))
