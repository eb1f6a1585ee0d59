"""Routes of base models: registration by table, lists, tables, differences, derivations."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from registry.schemas import (
    BaseInfo,
    BaseRegistration,
    DerivationInfo,
    DerivationRequest,
    DiffInfo,
    Page,
    RevisionRequest,
)
from registry.services import bases, pushes

from .deps import InTurn, Parts, User
from .pages import Limit, behind, cursor

router = APIRouter(prefix="/v1", tags=["bases"])


@router.post("/bases", status_code=201)
def register(request: BaseRegistration, parts: Parts, caller: User) -> BaseInfo:
    """Make a base known by its tensor table, without weights; again is fine."""
    model = pushes.read_table(request.table)
    with parts.database.write() as session:
        base = bases.register(session, caller, parts.settings, model, request, parts.clock())
    with parts.database.read() as session:
        return bases.infos(session, [base])[0]


@router.get("/bases")
def list_bases(
    parts: InTurn,
    caller: User,
    line: str | None = None,
    limit: Limit = 50,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[BaseInfo]:
    """Bases, newest first; with ``line`` those of one line."""
    (before,) = behind(after, ((1 << 31) - 1,))
    with parts.database.read() as session:
        rows = bases.page(session, caller, line=line, before=before, limit=limit)
        more = cursor(rows[-1].id) if len(rows) == limit else None
        return Page(items=bases.infos(session, rows), cursor=more)


@router.get("/bases/{ref}")
def show(ref: str, parts: InTurn, caller: User) -> BaseInfo:
    """One base: a digest, ``line@rN``, or a line (its newest)."""
    with parts.database.read() as session:
        return bases.show(session, caller, ref)


@router.get(
    "/bases/{ref}/table",
    response_class=Response,
    responses={
        200: {"content": {"application/zlib": {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "It is the one that the caller has"},
    },
)
def table(ref: str, parts: InTurn, caller: User, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The tensor table, compressed; immutable by digest."""
    with parts.database.read() as session:
        digest, body = bases.table(session, caller, ref)
    headers = {"ETag": f'"{digest}"'}
    if if_none_match == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/zlib", headers=headers)


@router.get("/bases/{a}/diff/{b}")
def difference(a: str, b: str, parts: InTurn, caller: User) -> DiffInfo:
    """What changes from ``a`` to ``b``, tensor by tensor."""
    with parts.database.read() as session:
        return bases.difference(session, caller, a, b)


@router.post("/bases/{ref}/derivations", status_code=201)
def derive(ref: str, request: DerivationRequest, parts: Parts, caller: User) -> DerivationInfo:
    """Declare how a base came from another."""
    with parts.database.write() as session:
        return bases.derive(session, caller, ref, request, parts.clock())


@router.post("/lines/{line}/revisions", status_code=201)
def go_back(line: str, request: RevisionRequest, parts: Parts, caller: User) -> BaseInfo:
    """Make what an earlier revision is the line's newest again, under a new number."""
    with parts.database.write() as session:
        base = bases.repeat(session, caller, line, request, parts.clock())
    with parts.database.read() as session:
        return bases.infos(session, [base])[0]
