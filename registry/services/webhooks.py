"""Webhooks: changes of state told to an address, in their order, at least once.

The outbox is the audit itself: its rows are written in the change's own transaction and get their places in one order
(`registry.services.audit`), so a webhook needs only to remember how far it has told. Who delivers claims a webhook with
a lease, tells row after row, and moves the cursor on after each answer; whoever dies in between is followed by another,
and the receiver knows a repetition by its ``seq``. An address that does not answer is asked again after a pause that
doubles up to an hour; a row that was refused `ATTEMPTS` times is left out, on record.

The secret must be at hand; where the registry has keys it is kept sealed (`registry.services.seals`).

    signature = hmac_sha256(secret, time "." body)      header  x-loractl-signature: t=<unix time>,v1=<hex>
"""

import hashlib
import hmac
import ipaddress
import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from sqlalchemy import or_
from sqlmodel import Session, col, select, update

from registry.core.errors import AddressRefused, BadRequest, WebhookNotFound
from registry.core.names import check_name
from registry.db.models import AuditHead, AuditRow, Webhook
from registry.schemas import WebhookRequest

from . import audit
from .references import nearest
from .seals import Seals
from .tokens import EVERYWHERE, Caller

NONE = Seals(())
"""No keys."""
TEST = "webhook.test"
LEASE = timedelta(seconds=60)
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=1), timedelta(hours=1)
ATTEMPTS = 24
_LOOKED_AT = 500
"""Rows of the audit that one delivery looks through for the next that is wanted."""


# ── a person's side ──────────────────────────────────────────────────────────


def check_url(url: str, *, private: bool = True) -> str:
    """``url`` itself when a webhook may lead there; `BadRequest` when not.

    Unless ``private``: `AddressRefused` for one that is an address and not on the internet. What a name means is
    looked up by who delivers, each time.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # brackets, a port, a name that cannot be
        host, port = b"", None
    if not host or port == 0 or parts.scheme not in ("http", "https") or parts.username or parts.password:
        raise BadRequest(problems=f"url: '{url[:100]}' is not http(s)://HOST/… without a password in it")
    name = str(parts.hostname)
    with suppress(ValueError):
        check_address("127.0.0.1" if name == "localhost" else name, name, private=private)
    return url


def check_address(address: str, host: str, *, private: bool) -> None:
    """`AddressRefused` for an address that is not on the internet, unless ``private``; ValueError when it is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if not private and (not ip.is_global or ip.is_multicast):
        raise AddressRefused(host=host, address=address)


def _check_event(event: str) -> None:
    """`BadRequest` for what no event is, and none begins with."""
    subject, point, _ = event.partition(".")
    if not (subject in audit.SUBJECTS if point else any(known.startswith(subject) for known in audit.SUBJECTS)):
        said = f"events: no event begins with '{event[:60]}'.{nearest(subject, audit.SUBJECTS)}"
        raise BadRequest(problems=f"{said} They are about: {', '.join(audit.SUBJECTS)}")


def add(
    session: Session,
    caller: Caller,
    request: WebhookRequest,
    now: datetime,
    seals: Seals = NONE,
    *,
    private: bool = False,
) -> tuple[Webhook, str]:
    """A new webhook, and its secret, shown this once: for admins of the namespace, or of everything without one.

    ``private``: its address may be one that is not on the internet.
    """
    if request.namespace is not None:
        check_name(request.namespace, "namespace")
    caller.require("admin", request.namespace or EVERYWHERE)
    check_url(request.url, private=private)
    for event in request.events:
        _check_event(event)
    secret = secrets.token_urlsafe(32)
    row = Webhook(
        id=f"w{secrets.token_hex(6)}",
        namespace=request.namespace,
        url=request.url,
        events=sorted(set(request.events)),
        secret="" if seals else secret,
        sealed=seals.seal(secret) if seals else None,
        cursor=session.exec(select(AuditHead.seq)).one(),
        due_at=now,
        created_by=caller.token_id,
        created_at=now,
    )
    session.add(row)
    session.flush()
    _audit(session, row, "webhook.added", caller, now)
    return row, secret


def listed(session: Session, caller: Caller) -> Sequence[Webhook]:
    """Webhooks of the namespaces that the caller administers."""
    if not caller.can_somewhere("admin"):
        caller.require("admin", EVERYWHERE)
    living = select(Webhook).where(col(Webhook.removed_at).is_(None))
    rows = session.exec(living.order_by(col(Webhook.created_at), col(Webhook.id)))
    return [row for row in rows if caller.can("admin", row.namespace or EVERYWHERE)]


def remove(session: Session, caller: Caller, identity: str, now: datetime) -> None:
    """Tell it nothing more; removing again is fine."""
    row = _mine(session, caller, identity)
    if row.removed_at is None:
        _audit(session, row, "webhook.removed", caller, now)
        row.removed_at = now
        session.add(row)


def test(session: Session, caller: Caller, identity: str, now: datetime) -> Webhook:
    """Let it be told something, on the way that everything goes, and at once."""
    row = _mine(session, caller, identity)
    _audit(session, row, TEST, caller, now)
    row.due_at, row.attempts = now, 0
    session.add(row)
    return row


def _mine(session: Session, caller: Caller, identity: str) -> Webhook:
    row = session.exec(select(Webhook).where(Webhook.id == identity).with_for_update()).first()
    if row is None or not caller.can("admin", row.namespace or EVERYWHERE):
        raise WebhookNotFound(id=identity[:64])
    return row


def _audit(session: Session, row: Webhook, event: str, caller: Caller, now: datetime) -> None:
    told = {"url": row.url, "events": row.events}
    audit.record(
        session, event, row.id, actor=caller.token_id, namespace=row.namespace, now=now, after=told
    )


# ── delivering ───────────────────────────────────────────────────────────────


def claim(session: Session, now: datetime) -> Webhook | None:
    """A webhook with something to tell, leased to the caller; those that waited longest first."""
    head = select(AuditHead.seq).scalar_subquery()
    free = or_(col(Webhook.lease_until).is_(None), col(Webhook.lease_until) <= now)
    query = select(Webhook).where(col(Webhook.due_at) <= now, free, col(Webhook.cursor) < head)
    query = query.where(col(Webhook.removed_at).is_(None))
    row = session.exec(query.order_by(col(Webhook.due_at)).limit(1).with_for_update(skip_locked=True)).first()
    if row is not None:
        row.lease_until = now + LEASE
        session.add(row)
    return row


def following(session: Session, hook: Webhook) -> tuple[AuditRow | None, int]:
    """The next row that the webhook wants, if one is near, and the place up to which none else is."""
    query = select(AuditRow).where(col(AuditRow.seq) > hook.cursor).order_by(col(AuditRow.seq)).limit(_LOOKED_AT)
    seen = hook.cursor
    for row in session.exec(query):
        seen = row.seq or seen
        if _wants(hook, row):
            return row, seen
    return None, seen


def _wants(hook: Webhook, row: AuditRow) -> bool:
    if row.event == TEST:
        return row.subject == hook.id
    ours = hook.namespace is None or row.namespace == hook.namespace
    return ours and (not hook.events or row.event.startswith(tuple(hook.events)))


def secret_of(hook: Webhook, seals: Seals) -> str | None:
    """What signs; None when it is sealed under a key that is not here."""
    if hook.sealed is None:
        return hook.secret
    opened = seals.open(hook.sealed)
    return opened[0] if opened else None


def reseal(session: Session, seals: Seals) -> int:
    """Seal by the newest key what is sealed by an older one, or not at all; how many."""
    if not seals:
        return 0
    changed = 0
    for row in session.exec(select(Webhook).where(col(Webhook.removed_at).is_(None)).with_for_update()):
        opened = seals.open(row.sealed) if row.sealed is not None else (row.secret, False)
        if opened is not None and not opened[1]:
            row.secret, row.sealed = "", seals.seal(opened[0])
            session.add(row)
            changed += 1
    return changed


def secrets_kept(session: Session, seals: Seals) -> tuple[int, int, list[str]]:
    """How many living webhooks have their secret as it is, how many sealed; ids of those that no key opens."""
    rows = session.exec(select(Webhook).where(col(Webhook.removed_at).is_(None))).all()
    closed = sorted(row.id for row in rows if secret_of(row, seals) is None)
    plain = sum(row.sealed is None for row in rows)
    return plain, len(rows) - plain, closed


def body(row: AuditRow) -> bytes:
    """What is told of a change."""
    facts = {name: value and json.loads(value) for name, value in (("before", row.before), ("after", row.after))}
    said = {"seq": row.seq, "at": row.at.isoformat(), "event": row.event, "subject": row.subject}
    more = {"namespace": row.namespace, "actor": row.actor, "reason": row.reason}
    return json.dumps(said | more | facts, ensure_ascii=False).encode()


def signature(secret: str, told: bytes, now: datetime) -> str:
    """What the receiver compares: it is of this body, and of this time."""
    at = str(int(now.timestamp()))
    return f"t={at},v1={hmac.new(secret.encode(), at.encode() + b'.' + told, hashlib.sha256).hexdigest()}"


def told(session: Session, hook: Webhook, seq: int, now: datetime) -> bool:
    """Move the cursor behind ``seq`` and go on; False when another has the webhook by now."""
    return _keep(session, hook, cursor=seq, attempts=0, last_error=None, due_at=now, lease_until=None)


def waits(session: Session, hook: Webhook, reason: str, now: datetime) -> bool:
    """Nothing can be told for a reason of ours: it waits, and nothing of it is left out."""
    return _keep(session, hook, last_error=reason, due_at=now + LONGEST_PAUSE, lease_until=None)


def refused(session: Session, hook: Webhook, row: AuditRow, error: str, now: datetime) -> bool:
    """Try again later; what was refused too often is left out."""
    attempts = hook.attempts + 1
    if attempts >= ATTEMPTS:
        facts = {"url": hook.url, "seq": row.seq, "error": error[:500]}
        if _keep(session, hook, cursor=row.seq, attempts=0, last_error=error[:500], due_at=now, lease_until=None):
            audit.record(
                session, "webhook.gave-up", hook.id, actor=audit.ITSELF, namespace=hook.namespace, now=now, after=facts
            )
            return True
        return False
    pause = min(FIRST_PAUSE * 2 ** (attempts - 1), LONGEST_PAUSE)
    return _keep(session, hook, attempts=attempts, last_error=error[:500], due_at=now + pause, lease_until=None)


def _keep(session: Session, hook: Webhook, **values: object) -> bool:
    mine = (col(Webhook.id) == hook.id, col(Webhook.lease_until) == hook.lease_until)
    return bool(session.exec(update(Webhook).where(*mine).values(**values)).rowcount)
