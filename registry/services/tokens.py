"""Bearer tokens: shown once, stored hashed, with scopes per namespace; who may do what.

A token is ``lora_<id>_<secret>``. The secret has 256 random bits, so a plain SHA-256 is enough to store
it: there is nothing to guess. A rotation gives a token a new secret; the one before stays good for a grace,
so that whoever holds it can be told the new one without a gap. Worker tokens are a kind of their own: they hold
queues in place of scopes, and may touch only the jobs they claimed (`registry.services.jobs`).
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Literal, TypeVar, TypeVarTuple

from sqlalchemy import Select
from sqlalchemy import select as columns
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select, update

from registry.core.errors import BadRequest, MoveNotAllowed, ScopeMissing, TokenNotFound, TokenRefused
from registry.core.names import check_name
from registry.db.among import among
from registry.db.models import Token
from registry.schemas import SCOPES, Scope

from . import audit

Texts = TypeVarTuple("Texts")
Result = TypeVar("Result")

_PREFIX = "lora"
_NO_SECRET = "oidc:"  # noqa: S105  # it is none
"""How the hash of who has no secret begins, so that none is ever equal to it."""
REMEMBERED = timedelta(days=30)
"""How long after a sign-in what somebody left to be done goes on in their name."""
LAST_USE_EVERY = timedelta(minutes=1)
"""How often at most a token's last use is written down."""
EVERYWHERE = "*"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what the token allows."""

    token_id: str
    name: str
    kind: Literal["user", "worker"]
    scopes: dict[str, list[str]]
    expires_at: datetime | None = None
    last_used_at: datetime | None = field(default=None, compare=False)

    def can(self, scope: Scope, namespace: str) -> bool:
        """Whether ``scope`` is granted on ``namespace``; admin covers every other scope there."""
        if self.kind != "user":
            return False
        granted = {*self.scopes.get(namespace, ()), *self.scopes.get(EVERYWHERE, ())}
        return scope in granted or "admin" in granted

    def can_somewhere(self, scope: Scope) -> bool:
        """Whether ``scope`` is granted on any namespace."""
        return any(self.can(scope, namespace) for namespace in self.scopes)

    def readable(self) -> list[str] | None:
        """Namespaces the caller may read; None for all."""
        if self.can("read", EVERYWHERE):
            return None
        return [namespace for namespace in self.scopes if self.can("read", namespace)]

    def require(self, scope: Scope, namespace: str) -> None:
        """`ScopeMissing` when ``scope`` is not granted on ``namespace``."""
        if not self.can(scope, namespace):
            granted = sorted({*self.scopes.get(namespace, ()), *self.scopes.get(EVERYWHERE, ())})
            what = "the kind 'worker'" if self.kind == "worker" else ", ".join(granted) or "none there"
            raise ScopeMissing(scope=scope, namespace=namespace, granted=what)

    def queues(self) -> list[str]:
        """Queues that a worker token may claim from."""
        return list(self.scopes.get("queues", ())) if self.kind == "worker" else []


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def split(text: str) -> tuple[str, str]:
    """A token's public id and its secret; `TokenRefused` when it has not the form of one."""
    prefix, _, rest = text.partition("_")
    identity, _, secret = rest.partition("_")
    if prefix != _PREFIX or not identity.isalnum() or len(identity) > 16 or len(secret) < 20:
        raise TokenRefused(reason="it has not the form lora_ID_SECRET")
    return identity, secret


def make_text() -> str:
    """A fresh token."""
    return f"{_PREFIX}_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"


def authenticate(session: Session, text: str, now: datetime) -> Caller:
    """The caller behind a bearer token; `TokenRefused` when it is unknown, revoked or expired."""
    [found] = authenticate_all(session, [text], now)
    if isinstance(found, TokenRefused):
        raise found
    return found


def authenticate_all(session: Session, texts: Sequence[str], now: datetime) -> list[Caller | TokenRefused]:
    """The caller behind each bearer token, or why it is refused; one query for any number."""
    asked = [_or_refusal(split, text) for text in texts]
    wanted = {one[0] for one in asked if not isinstance(one, TokenRefused)}
    known = {token.id: token for token in session.execute(_with_ids(), {"ids": wanted}).scalars()}

    def opened(identity: str, secret: str) -> Caller:
        token = known.get(identity)
        if token is None or not _opens(token, _hash(secret), now):
            raise TokenRefused(reason="it is unknown here")
        return _caller(token, now)

    return [one if isinstance(one, TokenRefused) else _or_refusal(opened, *one) for one in asked]


@cache
def _with_ids() -> Select[Token]:
    return columns(Token).where(among(col(Token.id), "ids"))


def _or_refusal(work: Callable[[*Texts], Result], *texts: *Texts) -> Result | TokenRefused:
    try:
        return work(*texts)
    except TokenRefused as refusal:
        return refusal


def _opens(token: Token, hashed: str, now: datetime) -> bool:
    """Whether this is the token's secret, or the one before its rotation while that is good."""
    if hmac.compare_digest(token.hash, hashed):
        return True
    if token.previous_hash is None or token.previous_until is None or token.previous_until <= now:
        return False
    return hmac.compare_digest(token.previous_hash, hashed)


def note_use(session: Session, identity: str, now: datetime) -> None:
    """Write down when the token was used, unless somebody did so a moment ago."""
    old = col(Token.last_used_at)
    stale = old.is_(None) | (old < now - LAST_USE_EVERY)
    session.exec(update(Token).where(col(Token.id) == identity, stale).values(last_used_at=now))


def acting(session: Session, identity: str, now: datetime) -> Caller:
    """The caller behind a token's id, for what its holder left to be done later; `TokenRefused` as ever."""
    token = session.get(Token, identity)
    if token is None:
        raise TokenRefused(reason=f"lora_{identity}_… is unknown here")
    return _caller(token, now)


def _caller(token: Token, now: datetime) -> Caller:
    if token.revoked_at is not None:
        raise TokenRefused(reason=f"it was revoked at {token.revoked_at:%Y-%m-%d %H:%M} UTC")
    if token.expires_at is not None and token.expires_at <= now:
        raise TokenRefused(reason=f"it expired at {token.expires_at:%Y-%m-%d %H:%M} UTC")
    return Caller(
        token_id=token.id,
        name=token.name,
        kind="worker" if token.kind == "worker" else "user",
        scopes=token.scopes,
        expires_at=token.expires_at,
        last_used_at=token.last_used_at,
    )


def person(
    session: Session, identity: str, name: str, scopes: dict[str, list[str]], now: datetime, *, keep: bool
) -> Caller | None:
    """The caller for somebody whom an identity provider vouches for; `TokenRefused` when they were revoked here.

    They have a row like a token's, without a secret: what they leave to be done later acts by it (`acting`), with the
    scopes and for `REMEMBERED` after their last sign-in. None when the row has to be written first (``keep``).
    """
    token = session.get(Token, identity, with_for_update=keep)
    before = {"name": token.name, "scopes": token.scopes} if token is not None else None
    after = {"name": name, "scopes": scopes}
    young = token is not None and token.expires_at is not None and token.expires_at - now > REMEMBERED / 2
    if token is not None and (token.revoked_at is not None or (before == after and young)):
        return _caller(token, now)
    if not keep:
        return None
    if token is None:
        token = Token(id=identity, hash=f"{_NO_SECRET}{identity}", kind="user", name=name, created_at=now)
    token.name, token.scopes, token.expires_at = name, scopes, now + REMEMBERED
    session.add(token)
    session.flush()
    if before != after:
        audit.record(session, "token.signed-in", identity, actor=identity, now=now, before=before, after=after)
    return _caller(token, now)


def create(
    session: Session,
    caller: Caller,
    *,
    name: str,
    kind: Literal["user", "worker"],
    scopes: dict[str, list[Scope]],
    queues: list[str],
    expires_in: float | None,
    now: datetime,
) -> tuple[Token, str]:
    """A new token and its text, shown this once; nobody can give more than an admin of that namespace holds."""
    if kind == "worker":
        caller.require("admin", EVERYWHERE)
        if scopes or not queues:
            raise BadRequest(problems="a worker token has queues and no scopes")
        granted: dict[str, list[str]] = {"queues": [check_name(queue, "queue") for queue in queues]}
    else:
        if queues or not any(scopes.values()):
            raise BadRequest(problems=f"a user token has scopes ({', '.join(SCOPES)}) per namespace, and no queues")
        for namespace in scopes:
            if namespace != EVERYWHERE:
                check_name(namespace, "namespace")
            caller.require("admin", namespace)
        granted = {namespace: [s for s in SCOPES if s in listed] for namespace, listed in scopes.items()}
    text = make_text()
    life = timedelta(seconds=expires_in) if expires_in else None
    return _store(session, text, name, kind, granted, now, life, caller.token_id), text


def ensure(
    session: Session,
    text: str,
    *,
    name: str,
    kind: Literal["user", "worker"],
    scopes: dict[str, list[str]],
    now: datetime,
) -> None:
    """Make a token from the settings valid: the first admin's and the embedded worker's."""
    identity, secret = split(text)
    found = session.get(Token, identity)
    if found is None:
        try:
            with session.begin_nested():
                _store(session, text, name, kind, scopes, now, None, audit.ITSELF)
            return
        except IntegrityError:  # two processes start at once
            found = session.get_one(Token, identity)
    if not hmac.compare_digest(found.hash, _hash(secret)):
        raise TokenRefused(reason=f"the settings name {_PREFIX}_{identity} with another secret than the one stored")


def _store(
    session: Session,
    text: str,
    name: str,
    kind: str,
    scopes: dict[str, list[str]],
    now: datetime,
    life: timedelta | None,
    actor: str,
) -> Token:
    identity, secret = split(text)
    token = Token(
        id=identity,
        hash=_hash(secret),
        kind=kind,
        name=name,
        scopes=scopes,
        created_at=now,
        expires_at=now + life if life else None,
    )
    session.add(token)
    session.flush()
    given = {"name": name, "kind": kind, "scopes": scopes, "expires_at": token.expires_at}
    of = next(iter(scopes)) if kind == "user" and len(scopes) == 1 and EVERYWHERE not in scopes else None
    audit.record(session, "token.created", identity, actor=actor, namespace=of, now=now, after=given)
    return token


def listed(session: Session, caller: Caller, prefix: str = "") -> list[Token]:
    """Tokens that the caller administers and whose text begins with ``prefix``, newest first."""
    if not caller.can_somewhere("admin"):
        caller.require("admin", EVERYWHERE)
    begins = col(Token.id).startswith(prefix.removeprefix(f"{_PREFIX}_"), autoescape=True)
    tokens = session.exec(select(Token).where(begins).order_by(col(Token.created_at).desc(), col(Token.id)))
    return [token for token in tokens if _administers(caller, token)]


def rotate(
    session: Session, caller: Caller, identity: str, grace: timedelta, now: datetime, *, fixed: Collection[str] = ()
) -> tuple[Token, str]:
    """A new secret for the token, and its text, shown this once; the old secret is good for ``grace`` from now on.

    One's own token may be rotated by itself. Rotating again ends the grace of the secret before the last one.
    ``fixed``: tokens that the settings name, whose secret only who writes the settings can change.
    """
    token = _mine(session, caller, identity)
    dead = "revoked" if token.revoked_at else "expired" if token.expires_at and token.expires_at <= now else None
    if token.hash.startswith(_NO_SECRET):
        dead = "an identity provider's"  # a secret would outlive what the provider says
    if dead or identity in fixed:
        raise MoveNotAllowed(
            noun="token", id=identity, state=dead or "named by the settings", move="rotate",
            allowed="active, made by loractl token create",
        )  # fmt: skip
    text = f"{_PREFIX}_{identity}_{secrets.token_urlsafe(32)}"
    token.previous_hash, token.previous_until = token.hash, now + grace
    token.hash = _hash(split(text)[1])
    session.add(token)
    until = {"previous_until": token.previous_until}
    audit.record(session, "token.rotated", identity, actor=caller.token_id, now=now, after=until)
    session.flush()
    return token, text


def revoke(session: Session, caller: Caller, identity: str, now: datetime) -> Token:
    """Refuse the token from now on; one's own token may always be revoked."""
    token = _mine(session, caller, identity)
    if token.revoked_at is not None:
        raise MoveNotAllowed(noun="token", id=identity, state="revoked", move="revoke", allowed="active")
    token.revoked_at = now
    session.add(token)
    audit.record(session, "token.revoked", token.id, actor=caller.token_id, now=now, before={"name": token.name})
    return token


def _mine(session: Session, caller: Caller, identity: str) -> Token:
    """The caller's own token, or one that they administer, held until the end of the transaction."""
    query = select(Token).where(Token.id == identity).with_for_update().execution_options(populate_existing=True)
    token = session.exec(query).first()
    if token is None or not (token.id == caller.token_id or _administers(caller, token)):
        raise TokenNotFound(id=identity[:16])
    return token


def _administers(caller: Caller, token: Token) -> bool:
    if token.kind == "worker":
        return caller.can("admin", EVERYWHERE)
    return bool(token.scopes) and all(caller.can("admin", namespace) for namespace in token.scopes)
