"""Routes of adapters: search and show, versions and manifests, history, aliases, compatibility, resolve."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool

from registry.core.errors import AdapterNotFound, BadRequest
from registry.core.fit import FitClass
from registry.core.names import Reference, SeriesName
from registry.core.policy import Evidence
from registry.db import queries
from registry.db.models import Adapter, Version
from registry.schemas import (
    AdapterInfo,
    AliasInfo,
    AliasRequest,
    CompatibleAdapter,
    EvaluationInfo,
    LineageInfo,
    LogInfo,
    Page,
    Resolution,
    RollbackRequest,
    SignatureInfo,
    SignatureRequest,
    SignaturesInfo,
    StandingInfo,
    StandingRequest,
    VersionInfo,
)
from registry.services import adapters, aliases, bases, evaluations, signatures, withdrawals
from registry.services.adapters import BY_DEFAULT, Filter
from registry.services.references import adapter_not_found, find_adapter, find_version, parse_version
from registry.services.tokens import Caller

from .deps import AppParts, InTurn, Parts, User
from .deps import parts as here
from .pages import Limit, behind, cursor
from .reads import Named, Question, SeriesPage, VersionsPage

router = APIRouter(prefix="/v1", tags=["adapters"])
_PATH = ("namespace", "name", "version")
_CHOICES = ("base", "engine", "fit")


def _classes(text: str | None) -> tuple[FitClass, ...]:
    if text is None:
        return BY_DEFAULT
    allowed = ", ".join(FitClass)
    try:
        return tuple(FitClass(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise BadRequest(problems=f"fit '{text}' is not one of {allowed}") from error


def _series(session: Session, caller: Caller, namespace: str, name: str) -> Adapter:
    return find_adapter(session, caller, SeriesName.parse(f"{namespace}/{name}"))


def _version(
    session: Session, caller: Caller, namespace: str, name: str, text: str, *, gone: bool = False
) -> tuple[Version, Adapter]:
    reference = parse_version(SeriesName.parse(f"{namespace}/{name}"), text)
    adapter = find_adapter(session, caller, reference.series)
    return find_version(session, adapter, reference, gone=gone), adapter


# Routes are tried in the order in which they stand here, so the two that servers ask all day come first.


def _reads(where: str, *names: str, required: bool) -> list[dict[str, Any]]:
    text = {"type": "string"}
    return [{"name": name, "in": where, "required": required, "schema": text} for name in names]


# These two read the request themselves and only describe what they read: FastAPI takes longer to read a handful of
# parameters than all the rest takes.
_OF_RESOLVE = {"parameters": [*_reads("query", "ref", required=True), *_reads("query", *_CHOICES, required=False)]}
_OF_MANIFEST = {
    "parameters": [*_reads("path", *_PATH, required=True), *_reads("header", "if-none-match", required=False)]
}


@router.get("/resolve", response_model=Resolution, openapi_extra=_OF_RESOLVE)
async def resolve(request: Request, caller: User) -> Response:
    """The one version for these weights, with signed URLs of its files; 409 with the nearest when there is none.

    An answer is given again while nothing that it depends on has changed, and while its URLs are young.
    """
    asked = request.query_params
    if "ref" not in asked:
        raise BadRequest(problems="query.ref: Field required")
    base, engine, fit = (asked.get(name) for name in _CHOICES)
    question = Question(Reference.parse(asked["ref"]), base, _classes(fit), engine)
    body = await here(request).reads.resolution(caller, question)
    return Response(body, media_type="application/json")


@router.get(
    "/adapters/{namespace}/{name}/versions/{version}/manifest",
    openapi_extra=_OF_MANIFEST,
    responses={304: {"description": "It is the one that the caller has"}},
)
async def show_manifest(request: Request, caller: User) -> Response:
    """The canonical bytes of the manifest; immutable where the version is named by its digest."""
    house, (namespace, name, version) = here(request), (request.path_params[part] for part in _PATH)
    reference = parse_version(SeriesName.parse(f"{namespace}/{name}"), version)
    digest, body = version, None
    if reference.digest is not None and caller.can("read", namespace):
        body = await house.reads.manifest(Named(namespace, name, digest))
    if body is None:
        digest, body = await run_in_threadpool(_manifest, house, caller, reference)
    etag = f'"{digest}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _manifest(parts: AppParts, caller: Caller, reference: Reference) -> tuple[str, bytes]:
    """Digest and bytes of what is named otherwise than by its digest, or the refusal."""
    with parts.database.read() as session:
        row = find_version(session, find_adapter(session, caller, reference.series), reference)
        return row.digest, adapters.manifest_body(session, row.digest)


@router.get("/adapters")
async def list_adapters(
    request: Request,
    caller: User,
    q: str | None = None,
    namespace: str | None = None,
    task: str | None = None,
    limit: Limit = 50,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[AdapterInfo]:
    """Adapters by name, whose name or task holds ``q``."""
    key = behind(after, ("", ""))
    namespaces = caller.readable()
    if namespace is not None:
        namespaces = [namespace] if namespaces is None or namespace in namespaces else []
    found = await here(request).reads.series_page(SeriesPage(namespaces, q, task, key, limit))
    more = cursor(found[-1][0].namespace, found[-1][0].name) if len(found) == limit else None
    return Page(items=[info for _, info in found], cursor=more)


@router.get("/adapters/{namespace}/{name}")
async def show_adapter(request: Request, namespace: str, name: str, caller: User) -> AdapterInfo:
    """One adapter with its newest version and its aliases on every base."""
    series = SeriesName.parse(f"{namespace}/{name}")
    found = await here(request).reads.series(series) if caller.can("read", namespace) else None
    if found is None:
        raise await run_in_threadpool(_missing, here(request), caller, series)
    return found


def _missing(parts: AppParts, caller: Caller, series: SeriesName) -> AdapterNotFound:
    with parts.database.read() as session:
        return adapter_not_found(session, caller, series)


@router.get("/adapters/{namespace}/{name}/versions")
async def list_versions(
    request: Request,
    namespace: str,
    name: str,
    caller: User,
    limit: Limit = 50,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[VersionInfo]:
    """Versions, newest first."""
    (before,) = behind(after, (1 << 30,))
    series = SeriesName.parse(f"{namespace}/{name}")
    reads = here(request).reads
    found = await reads.versions_page(VersionsPage(series, before, limit)) if caller.can("read", namespace) else None
    if found is None:
        raise await run_in_threadpool(_missing, here(request), caller, series)
    more = cursor(found[-1][0].number) if len(found) == limit else None
    return Page(items=[info for _, info in found], cursor=more)


@router.get("/adapters/{namespace}/{name}/versions/{version}")
def show_version(namespace: str, name: str, version: str, parts: InTurn, caller: User) -> VersionInfo:
    """One version: ``vN`` or its digest."""
    with parts.database.read() as session:
        return adapters.describe(session, [_version(session, caller, namespace, name, version)])[0]


@router.get("/adapters/{namespace}/{name}/versions/{version}/signatures")
def list_signatures(namespace: str, name: str, version: str, parts: InTurn, caller: User) -> SignaturesInfo:
    """Every signature of the version, those by revoked keys too."""
    with parts.database.read() as session:
        row, adapter = _version(session, caller, namespace, name, version)
        return signatures.show(session, adapter, row)


@router.post("/adapters/{namespace}/{name}/versions/{version}/signatures")
def sign_version(
    namespace: str, name: str, version: str, request: SignatureRequest, parts: Parts, caller: User
) -> SignatureInfo:
    """Add a signature by a living key of the namespace; one of each key is kept, the first."""
    with parts.database.write() as session:
        row, adapter = _version(session, caller, namespace, name, version)
        return signatures.sign(session, caller, adapter, row, request.bundle, parts.clock())


@router.post("/adapters/{namespace}/{name}/versions/{version}/{move}")
def change_standing(
    namespace: str,
    name: str,
    version: str,
    move: Literal["yank", "quarantine", "reinstate", "delete"],
    request: StandingRequest,
    parts: InTurn,
    caller: User,
) -> StandingInfo:
    """Take a version out of use, or back: 409 names what refers to it; with ``force`` the answer names what follows.

    Repeating a move changes nothing: a client whose reply was lost asks again, also for a deletion.
    """
    with parts.database.write() as session:
        row, adapter = _version(session, caller, namespace, name, version, gone=move == "delete")
        follows = withdrawals.move(
            session, caller, adapter, row, move, reason=request.reason, force=request.force, now=parts.clock()
        )
        return StandingInfo(version=adapters.describe(session, [(row, adapter)])[0], follows=follows)


@router.get("/adapters/{namespace}/{name}/log")
def show_log(
    namespace: str,
    name: str,
    parts: InTurn,
    caller: User,
    limit: Limit = 100,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> LogInfo:
    """What happened to the adapter, newest first."""
    version, move = behind(after, adapters.NEWEST)
    with parts.database.read() as session:
        adapter = _series(session, caller, namespace, name)
        entries, last = adapters.history(session, adapter, before=(version, move), limit=limit)
        more = cursor(*last) if len(entries) == limit else None
        return LogInfo(name=f"{namespace}/{name}", entries=entries, cursor=more)


@router.get("/adapters/{namespace}/{name}/lineage")
def show_lineage(namespace: str, name: str, parts: InTurn, caller: User, version: str | None = None) -> LineageInfo:
    """What a version (the newest by default) was made from."""
    with parts.database.read() as session:
        if version is not None:
            row, _ = _version(session, caller, namespace, name, version)
        else:
            series = SeriesName.parse(f"{namespace}/{name}")
            row = find_version(session, find_adapter(session, caller, series), Reference(series))
        return adapters.lineage(session, caller, row)


@router.get("/adapters/{namespace}/{name}/evaluations")
def list_evaluations(
    namespace: str,
    name: str,
    parts: InTurn,
    caller: User,
    limit: Limit = 100,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[EvaluationInfo]:
    """Evaluations of all versions, oldest first."""
    (key,) = behind(after, (0,))
    with parts.database.read() as session:
        adapter = _series(session, caller, namespace, name)
        rows = queries.evaluations_of(session, adapter.id or 0, after=key, limit=limit)
        more = cursor(rows[-1].evaluation.id) if len(rows) == limit else None
        return Page(items=evaluations.described(rows), cursor=more)


@router.get("/adapters/{namespace}/{name}/aliases")
def list_aliases(namespace: str, name: str, parts: InTurn, caller: User) -> list[AliasInfo]:
    """Aliases on every base."""
    with parts.database.read() as session:
        adapter = _series(session, caller, namespace, name)
        return adapters.describe_aliases(session, adapter)


@router.put("/adapters/{namespace}/{name}/aliases/{alias}")
def set_alias(
    namespace: str,
    name: str,
    alias: str,
    request: AliasRequest,
    parts: InTurn,
    caller: User,
    if_match: Annotated[str | None, Header()] = None,
) -> AliasInfo:
    """Point an alias to a version, on that version's base; ``If-Match`` with the generation makes it a compare-and-set.

    A generation of 0 means that the alias must not exist yet. 412 when it moved, 422 when its gate has not passed.
    """
    expected = _generation(if_match)
    with parts.database.write() as session:
        version, adapter = _version(session, caller, namespace, name, request.version)
        moved = aliases.set_alias(
            session,
            parts.store,
            caller,
            adapter=adapter,
            version=version,
            alias=alias,
            expected=expected,
            force=request.force,
            reason=request.reason,
            now=parts.clock(),
        )
        return adapters.describe_alias(session, moved)


def _generation(if_match: str | None) -> int:
    if if_match is None:
        return aliases.ANY
    text = if_match.strip('"')
    if not text.isdecimal():
        raise BadRequest(problems=f"If-Match is '{if_match[:50]}'; expected an alias's generation")
    return int(text)


@router.post("/adapters/{namespace}/{name}/aliases/{alias}/rollback")
def roll_back(
    namespace: str, name: str, alias: str, request: RollbackRequest, parts: InTurn, caller: User
) -> AliasInfo:
    """Point the alias to where it pointed before its last move."""
    with parts.database.write() as session:
        adapter = _series(session, caller, namespace, name)
        if request.base is not None:
            base = bases.find(session, request.base)
        else:
            base = adapters.resolve(session, caller, Reference(SeriesName(namespace, name), alias=alias), None).base
        moved = aliases.roll_back(
            session, caller, adapter=adapter, base=base, alias=alias, reason=request.reason, now=parts.clock()
        )
        return adapters.describe_alias(session, moved)


@router.get("/bases/{base}/adapters")
def list_compatible(
    base: str,
    parts: InTurn,
    caller: User,
    fit: str | None = None,
    engine: str | None = None,
    alias: str | None = None,
    max_rank: Annotated[int | None, Query(ge=1, le=1 << 31)] = None,
    evidence: Literal["recorded", "resolved", "behavioural", "declared"] | None = None,
    namespace: str | None = None,
    task: str | None = None,
    limit: Limit = 50,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[CompatibleAdapter]:
    """Adapters that fit this base, with class, reasons, evidence and newest evaluations."""
    (key,) = behind(after, (0,))
    wanted = Filter(_classes(fit), alias, engine, max_rank, Evidence(evidence) if evidence else None, namespace, task)
    with parts.database.read() as session:
        row = bases.find(session, base)
        found = adapters.compatible(session, caller, row, wanted, after=key, limit=limit)
        infos = adapters.describe(session, [(version, adapter) for version, adapter, _ in found])
        items = [CompatibleAdapter(version=i, fit=f) for i, (_, _, f) in zip(infos, found, strict=True)]
        more = cursor(found[-1][0].id) if len(found) == limit else None
        return Page(items=items, cursor=more)
