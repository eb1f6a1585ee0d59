"""Routes of the audit: what was changed, and the chain that shows that nothing of it was changed since."""

import json
from typing import Annotated

from fastapi import APIRouter, Query

from registry.db.models import AuditRow
from registry.schemas import AuditInfo, ChainInfo, LinkedInfo, Page
from registry.services import audit

from .deps import Parts, User
from .pages import Limit, behind, cursor

router = APIRouter(prefix="/v1/audit", tags=["audit"])
_LAST = (1 << 63) - 1


@router.get("")
def list_audit(
    parts: Parts,
    caller: User,
    namespace: str | None = None,
    event: str | None = None,
    subject: str | None = None,
    actor: str | None = None,
    limit: Limit = 100,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[AuditInfo]:
    """Changes of state, newest first; ``event`` may be a beginning, such as ``alias.``. For admins of the namespace."""
    (before,) = behind(after, (_LAST,))
    with parts.database.read() as session:
        rows = audit.page(
            session,
            caller,
            namespace=namespace,
            event=event,
            subject=subject,
            actor=actor,
            before=before,
            limit=limit,
        )
    return Page(
        items=[_info(row, name) for row, name in rows], cursor=cursor(rows[-1][0].id) if len(rows) == limit else None
    )


def _info(row: AuditRow, name: str | None) -> AuditInfo:
    facts = {key: value and json.loads(value) for key, value in (("before", row.before), ("after", row.after))}
    return AuditInfo.model_validate(row.model_dump() | facts | {"name": name})


@router.get("/chain")
def show_chain(
    parts: Parts,
    caller: User,
    after: Annotated[int, Query(ge=0, lt=1 << 63)] = 0,
    limit: Annotated[int, Query(ge=1, le=5000)] = 2000,
) -> ChainInfo:
    """Rows in the order of the chain behind place ``after``, as stored: whoever asks can compute the links."""
    with parts.database.read() as session:
        head, waiting, rows = audit.chained(session, caller, after=after, limit=limit)
    told = [
        LinkedInfo.model_validate(
            {"seq": row.seq, "link": row.link} | {name: getattr(row.entry, name) for name in row.entry.__slots__}
        )
        for row in rows
    ]
    return ChainInfo(seq=head.seq, link=head.link, waiting=waiting, rows=told)
