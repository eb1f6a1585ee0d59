"""Routes of adapters: search and show, versions and manifests, history, aliases, compatibility, resolve."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool

from registry.core.errors import BadRequest
from registry.core.fit import FitClass
from registry.core.names import Reference, SeriesName
from registry.core.policy import Evidence
from registry.db import queries
from registry.db.models import Adapter, Base, Version
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
from registry.services import adapters, aliases, bases, downloads, evaluations, signatures, withdrawals
from registry.services.adapters import BY_DEFAULT, Filter
from registry.services.references import find_adapter, find_version, parse_version
from registry.services.tokens import Caller

from .deps import AppParts, Parts, User
from .deps import parts as here
from .pages import Limit, behind, cursor

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
    parts, asked = here(request), request.query_params
    if "ref" not in asked:
        raise BadRequest(problems="query.ref: Field required")
    choices = base, engine, fit = tuple(asked.get(name) for name in _CHOICES)
    reference = Reference.parse(asked["ref"])
    pointer = adapters.pointer(caller, reference, base)
    pointed = None if pointer is None else await parts.pointed(pointer)
    key = (reference, *choices, pointed)
    body = None if pointed is None else parts.resolutions.get(key)
    if body is None:
        body = await run_in_threadpool(_resolved, parts, caller, reference, base, engine, fit)
        if pointer is not None and pointed is not None and pointed == await parts.pointed(pointer):
            parts.resolutions.keep(key, body, life_s=parts.settings.url_ttl_s / 4)
    return Response(body, media_type="application/json")


def _resolved(
    parts: AppParts, caller: Caller, reference: Reference, base: str | None, engine: str | None, fit: str | None
) -> bytes:
    with parts.database.read() as session:
        row = bases.find(session, base) if base is not None else None
        found = adapters.resolve(session, caller, reference, row, classes=_classes(fit), engine=engine)
        digest = found.version.digest
        answer = Resolution(
            version=adapters.describe(session, [(found.version, found.adapter)])[0],
            fit=found.fit,
            base=found.base.digest,
            base_assumed=found.assumed,
            manifest=digest,
            files=downloads.files(session, parts.store, parts.settings, [digest])[digest],
            signature_required=signatures.is_required(session, found.adapter.namespace),
        )
    return answer.model_dump_json(by_alias=True).encode()


@router.get(
    "/adapters/{namespace}/{name}/versions/{version}/manifest",
    openapi_extra=_OF_MANIFEST,
    responses={304: {"description": "It is the one that the caller has"}},
)
async def show_manifest(request: Request, caller: User) -> Response:
    """The canonical bytes of the manifest; immutable where the version is named by its digest."""
    house, (namespace, name, version) = here(request), (request.path_params[part] for part in _PATH)
    body = house.manifests.get((namespace, name, version)) if caller.can("read", namespace) else None
    digest = version
    if body is None:
        digest, body = await run_in_threadpool(_manifest, house, caller, namespace, name, version)
    etag = f'"{digest}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _manifest(parts: AppParts, caller: Caller, namespace: str, name: str, version: str) -> tuple[str, bytes]:
    """Digest and bytes; remembered under the digest, by which they never change."""
    with parts.database.read() as session:
        row, _ = _version(session, caller, namespace, name, version)
        body = adapters.manifest_body(session, row.digest)
    parts.manifests.keep((namespace, name, row.digest), body)
    return row.digest, body


@router.get("/adapters")
def list_adapters(
    parts: Parts,
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
    with parts.database.read() as session:
        rows = adapters.page(session, namespaces=namespaces, text=q, task=task, after=key, limit=limit)
        more = cursor(rows[-1].namespace, rows[-1].name) if len(rows) == limit else None
        return Page(items=adapters.describe_adapters(session, rows), cursor=more)


@router.get("/adapters/{namespace}/{name}")
def show_adapter(namespace: str, name: str, parts: Parts, caller: User) -> AdapterInfo:
    """One adapter with its newest version and its aliases on every base."""
    with parts.database.read() as session:
        return adapters.describe_adapters(session, [_series(session, caller, namespace, name)])[0]


@router.get("/adapters/{namespace}/{name}/versions")
def list_versions(
    namespace: str,
    name: str,
    parts: Parts,
    caller: User,
    limit: Limit = 50,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[VersionInfo]:
    """Versions, newest first."""
    (before,) = behind(after, (1 << 30,))
    with parts.database.read() as session:
        adapter = _series(session, caller, namespace, name)
        rows = adapters.versions_page(session, adapter, before=before, limit=limit)
        more = cursor(rows[-1].number) if len(rows) == limit else None
        return Page(items=adapters.describe(session, [(row, adapter) for row in rows]), cursor=more)


@router.get("/adapters/{namespace}/{name}/versions/{version}")
def show_version(namespace: str, name: str, version: str, parts: Parts, caller: User) -> VersionInfo:
    """One version: ``vN`` or its digest."""
    with parts.database.read() as session:
        return adapters.describe(session, [_version(session, caller, namespace, name, version)])[0]


@router.get("/adapters/{namespace}/{name}/versions/{version}/signatures")
def list_signatures(namespace: str, name: str, version: str, parts: Parts, caller: User) -> SignaturesInfo:
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
    parts: Parts,
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
    parts: Parts,
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
def show_lineage(namespace: str, name: str, parts: Parts, caller: User, version: str | None = None) -> LineageInfo:
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
    parts: Parts,
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
def list_aliases(namespace: str, name: str, parts: Parts, caller: User) -> list[AliasInfo]:
    """Aliases on every base."""
    with parts.database.read() as session:
        adapter = _series(session, caller, namespace, name)
        return adapters.describe_aliases(session, [adapter.id or 0]).get(adapter.id or 0, [])


def _alias_info(session: Session, adapter: Adapter, base: Base, alias: str) -> AliasInfo:
    found = adapters.describe_aliases(session, [adapter.id or 0])[adapter.id or 0]
    return next(info for info in found if info.alias == alias and info.base == base.digest)


@router.put("/adapters/{namespace}/{name}/aliases/{alias}")
def set_alias(
    namespace: str,
    name: str,
    alias: str,
    request: AliasRequest,
    parts: Parts,
    caller: User,
    if_match: Annotated[str | None, Header()] = None,
) -> AliasInfo:
    """Point an alias to a version, on that version's base; ``If-Match`` with the generation makes it a compare-and-set.

    A generation of 0 means that the alias must not exist yet. 412 when it moved, 422 when its gate has not passed.
    """
    expected = _generation(if_match)
    with parts.database.write() as session:
        version, adapter = _version(session, caller, namespace, name, request.version)
        aliases.set_alias(
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
        base = session.get_one(Base, version.base_id)
        return _alias_info(session, adapter, base, alias)


def _generation(if_match: str | None) -> int:
    if if_match is None:
        return aliases.ANY
    text = if_match.strip('"')
    if not text.isdecimal():
        raise BadRequest(problems=f"If-Match is '{if_match[:50]}'; expected an alias's generation")
    return int(text)


@router.post("/adapters/{namespace}/{name}/aliases/{alias}/rollback")
def roll_back(namespace: str, name: str, alias: str, request: RollbackRequest, parts: Parts, caller: User) -> AliasInfo:
    """Point the alias to where it pointed before its last move."""
    with parts.database.write() as session:
        adapter = _series(session, caller, namespace, name)
        if request.base is not None:
            base = bases.find(session, request.base)
        else:
            base = adapters.resolve(session, caller, Reference(SeriesName(namespace, name), alias=alias), None).base
        aliases.roll_back(
            session, caller, adapter=adapter, base=base, alias=alias, reason=request.reason, now=parts.clock()
        )
        return _alias_info(session, adapter, base, alias)


@router.get("/bases/{base}/adapters")
def list_compatible(
    base: str,
    parts: Parts,
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
