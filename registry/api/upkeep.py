"""Routes of upkeep: quotas of namespaces, and fsck."""

from collections.abc import Iterator

from fastapi import APIRouter
from starlette.responses import StreamingResponse

from registry.core.errors import LoractlError
from registry.schemas import FsckLine, FsckRequest, QuotaInfo, QuotaRequest
from registry.services import audit, fsck, quotas

from .deps import AppParts, Parts, User

router = APIRouter(prefix="/v1", tags=["upkeep"])


@router.get("/namespaces/{namespace}/quota")
def show_quota(namespace: str, parts: Parts, caller: User) -> QuotaInfo:
    """Bytes that the namespace holds and may hold, and how long it keeps what nothing refers to."""
    with parts.database.read() as session:
        return quotas.show(session, caller, namespace, parts.clock())


@router.put("/namespaces/{namespace}/quota")
def set_quota(namespace: str, request: QuotaRequest, parts: Parts, caller: User) -> QuotaInfo:
    """Set both bounds; for admins of everything."""
    with parts.database.write() as session:
        return quotas.put(session, caller, namespace, request, parts.clock())


class Lines(StreamingResponse):
    """An answer of one JSON object a line."""

    media_type = "application/x-ndjson"


@router.post("/fsck", response_model=FsckLine, response_class=Lines)
def check(request: FsckRequest, parts: Parts, caller: User) -> Lines:
    """Compare bucket and rows, both ways; a line (NDJSON) for each finding, and for progress. For admins of everything.

    A check runs on after its first line was sent, so what ends it early is the last line.
    """
    caller.require("admin", "*")
    with parts.database.write() as session:
        asked = request.model_dump()
        audit.record(session, "fsck.begun", "*", actor=caller.token_id, now=parts.clock(), after=asked)
    return Lines(_lines(parts, request, caller.token_id))


def _lines(parts: AppParts, request: FsckRequest, actor: str) -> Iterator[bytes]:
    found = fsck.check(
        parts.database, parts.store, parts.replica, deep=request.deep, repair=request.repair, actor=actor,
        now=parts.clock(),
    )  # fmt: skip
    try:
        for line in found:
            yield line.model_dump_json().encode() + b"\n"
    except LoractlError as error:
        yield FsckLine(kind="error", error=error.problem()).model_dump_json().encode() + b"\n"
