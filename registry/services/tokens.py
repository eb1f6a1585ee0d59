"""Bearer tokens: shown once, stored hashed, with scopes per namespace; who may do what.

A token is ``lora_<id>_<secret>``. The secret has 256 random bits, so a plain SHA-256 is enough to store
it: there is nothing to guess. Worker tokens are a kind of their own: they hold queues in place of
scopes, and may touch only the jobs they claimed (`registry.services.jobs`).
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from registry.core.errors import BadRequest, MoveNotAllowed, ScopeMissing, TokenNotFound, TokenRefused
from registry.core.names import check_name
from registry.db.models import Token
from registry.schemas import SCOPES, Scope

from . import audit

_PREFIX = "lora"
EVERYWHERE = "*"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what the token allows."""

    token_id: str
    name: str
    kind: Literal["user", "worker"]
    scopes: dict[str, list[str]]
    expires_at: datetime | None = None

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
    identity, secret = split(text)
    token = session.get(Token, identity)
    if token is None or not hmac.compare_digest(token.hash, _hash(secret)):
        raise TokenRefused(reason="it is unknown here")
    return _caller(token, now)


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
    )


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


def listed(session: Session, caller: Caller) -> list[Token]:
    """Tokens that the caller administers, newest first."""
    if not caller.can_somewhere("admin"):
        caller.require("admin", EVERYWHERE)
    tokens = session.exec(select(Token).order_by(col(Token.created_at).desc(), col(Token.id)))
    return [token for token in tokens if _administers(caller, token)]


def revoke(session: Session, caller: Caller, identity: str, now: datetime) -> Token:
    """Refuse the token from now on; one's own token may always be revoked."""
    token = session.get(Token, identity)
    if token is None or not (token.id == caller.token_id or _administers(caller, token)):
        raise TokenNotFound(id=identity)
    if token.revoked_at is not None:
        raise MoveNotAllowed(noun="token", id=identity, state="revoked", move="revoke", allowed="active")
    token.revoked_at = now
    session.add(token)
    audit.record(session, "token.revoked", token.id, actor=caller.token_id, now=now, before={"name": token.name})
    return token


def _administers(caller: Caller, token: Token) -> bool:
    if token.kind == "worker":
        return caller.can("admin", EVERYWHERE)
    return bool(token.scopes) and all(caller.can("admin", namespace) for namespace in token.scopes)
