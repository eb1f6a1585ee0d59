"""Routes of pushes: open, parts, seal, state, commit, abort. A worker's own pushes are opened at its job."""

from typing import Any

from fastapi import APIRouter, Response

from registry.core.lifecycle import PushState
from registry.core.manifest import Kind
from registry.core.names import SeriesName
from registry.schemas import PartsInfo, PartsRequest, PushInfo, PushRequest, SealRequest
from registry.services import pushes
from registry.services.tokens import Caller

from .deps import Anyone, AppParts, Parts, User

router = APIRouter(prefix="/v1", tags=["pushes"])
_THERE: dict[int | str, dict[str, Any]] = {200: {"model": PushInfo, "description": "Exactly this version is there"}}


def _series_routes(kind: Kind) -> APIRouter:
    made = APIRouter()

    path = f"/{kind}s/{{namespace}}/{{name}}/pushes"

    @made.post(path, status_code=201, responses=_THERE, operation_id=f"open_{kind}_push")
    def opened(
        namespace: str, name: str, request: PushRequest, parts: Parts, caller: User, response: Response
    ) -> PushInfo:
        """Open, resume, or learn that exactly this version exists (200, ``committed``)."""
        return _opened(parts, caller, kind, SeriesName.parse(f"{namespace}/{name}", kind), request, response)

    return made


router.include_router(_series_routes("adapter"))
router.include_router(_series_routes("dataset"))
router.include_router(_series_routes("suite"))


@router.post("/bases/pushes", status_code=201, responses=_THERE)
def open_base_push(request: PushRequest, parts: Parts, caller: User, response: Response) -> PushInfo:
    """The same for a base model, to the wished line."""
    return _opened(parts, caller, "base", pushes.base_series(request.wishes), request, response)


def _opened(
    parts: AppParts, caller: Caller, kind: Kind, series: SeriesName, request: PushRequest, response: Response
) -> PushInfo:
    now = parts.clock()
    with parts.database.write() as session:
        push = pushes.open_push(
            session, caller, parts.settings, kind=kind, series=series, request=request, now=now
        )
    if push.state == PushState.COMMITTED:
        response.status_code = 200
    with parts.database.read() as session:  # the push may be another's, whose version this is
        return pushes.describe_opened(session, parts.store, parts.settings, push, request, now)


@router.post("/pushes/{push_id}/parts")
def parts_of(push_id: str, request: PartsRequest, parts: Parts, caller: Anyone) -> PartsInfo:
    """Signed URLs for parts of a large blob, and which have arrived."""
    return pushes.parts(parts.database, parts.store, parts.settings, caller, push_id, request, parts.clock())


@router.post("/pushes/{push_id}/seal")
def seal(push_id: str, request: SealRequest, parts: Parts, caller: Anyone) -> PushInfo:
    """Tell the digests that a draft lacked: the push, or the committed one when its version is there by now."""
    now = parts.clock()
    with parts.database.write() as session:
        push = pushes.seal(session, caller, parts.settings, push_id, request.digests, now)
    with parts.database.read() as session:  # it may be another's, as when a push is opened
        return pushes.describe(session, parts.store, parts.settings, push, now)


@router.get("/pushes/{push_id}")
def show_push(push_id: str, parts: Parts, caller: Anyone) -> PushInfo:
    """State of the push and of every blob, with fresh URLs."""
    return _described(parts, push_id, caller)


@router.post("/pushes/{push_id}/commit", status_code=202, responses={201: {"model": PushInfo}})
def commit(push_id: str, parts: Parts, caller: Anyone, response: Response) -> PushInfo:
    """Ask for the commit, or how it stands: 202 while it is verified (a job's: until the job ends), 201 when done."""
    now = parts.clock()
    push = pushes.ask_commit(parts.database, parts.store, caller, push_id, now)
    if push.state == PushState.COMMITTED:
        response.status_code = 201
        if push.changed_at == now:
            parts.meters.pushes.labels(push.kind).observe((now - push.created_at).total_seconds())
    return _described(parts, push_id, caller)


@router.delete("/pushes/{push_id}")
def abort(push_id: str, parts: Parts, caller: Anyone) -> PushInfo:
    """End the push; what was staged is removed."""
    with parts.database.write() as session:
        pushes.abort(session, caller, push_id, parts.clock())
    return _described(parts, push_id, caller)


def _described(parts: AppParts, push_id: str, caller: Caller) -> PushInfo:
    with parts.database.read() as session:
        push = pushes.get(session, caller, push_id)
        return pushes.describe(session, parts.store, parts.settings, push, parts.clock())
