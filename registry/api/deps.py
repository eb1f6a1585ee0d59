"""What a route needs: the app's parts, the caller behind the token, and who may use which route.

Routes take `Parts` (or `InTurn`) and `User` (or `Worker`), open ``parts.database.read()`` or ``.write()`` themselves
and call one service in it: the end of the write block is the commit. What must follow a commit (waking
workers) comes after the block.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from time import monotonic
from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from registry import parts as house
from registry import traces
from registry.core.errors import (
    RateExceeded,
    ScopeMissing,
    SignInsLimited,
    TokenMissing,
    TokenRefused,
    Unavailable,
    WriteConflict,
)
from registry.oidc import Provider, is_jwt
from registry.services import tokens
from registry.services.jobs import Origin
from registry.services.tokens import LAST_USE_EVERY, Caller, authenticate_all, note_use

from .limits import Limits, Rate
from .metrics import Meters
from .reads import Reads
from .together import Together
from .turns import Turns

_TOKEN_TTL_S = 0.8
_TOKENS_KEPT = 4096
_ALONG = 1024
"""Tokens that are looked up again because another one is, at most."""
_AT_ONCE, _PATIENCE_S = 2, 1.0


@dataclass(slots=True)
class _Known:
    """Who is behind a token, until when that is believed, and whether they asked for anything since it was found."""

    until: float
    caller: Caller
    asked: bool = False


@dataclass
class AppParts(house.Parts):
    """The parts of one API process, and the callers it remembers for a moment."""

    callers: OrderedDict[str, _Known] = field(default_factory=OrderedDict)
    _forgotten: int = 0
    """How often a token was forgotten: what was looked up before may be over."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _clerk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "last-use"))
    """Writes down when tokens were used, beside the requests: no reader waits for a writer."""
    turns: Turns = field(default_factory=lambda: Turns(_AT_ONCE, _PATIENCE_S))
    limits: Limits = field(init=False)
    meters: Meters = field(init=False)
    reads: Reads = field(init=False)
    oidc: Provider | None = field(init=False, default=None)
    _noted: dict[str, datetime] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What is made of the other parts."""
        self.reads = Reads(self, self.turns)
        self._authentications = Together(self._authenticated, self.turns)
        self.meters = Meters(self.database, self.clock)
        if self.settings.oidc is not None:
            self.oidc = Provider(self.settings.oidc, self.clock)
        broker = self.settings.broker_url
        self.limits = Limits(broker if broker.startswith(("redis://", "rediss://", "unix://")) else None)

    def caller(self, token: str) -> Caller:
        """The caller behind ``token``, remembered for less than a second: a revocation holds within one."""
        if known := self.known(token):
            return known
        now, forgotten = monotonic(), self._forgotten
        if self.oidc and is_jwt(token):
            return self._remember(token, self._signed_in(self.oidc, token), now, forgotten)
        with self.database.read() as session:
            return self._remember(token, tokens.authenticate(session, token, self.clock()), now, forgotten)

    async def _caller(self, token: str) -> Caller:
        """As `caller`, asked together with all who come at the same moment."""
        if self.oidc and is_jwt(token):
            return await run_in_threadpool(self.caller, token)
        found = await self._authentications.ask(token)
        if isinstance(found, TokenRefused):
            raise found
        return found

    def _remember(self, token: str, caller: Caller, now: float, forgotten: int) -> Caller:
        """Who was looked up at ``now``, when so many had been forgotten: if more are since, this one may be."""
        with self._lock:
            if self._forgotten == forgotten:
                self.callers[token] = _Known(now + _TOKEN_TTL_S, caller)
                self.callers.move_to_end(token)
            while len(self.callers) > _TOKENS_KEPT:
                self.callers.popitem(last=False)
        self._note_use(caller)
        return caller

    def _authenticated(self, asked: Sequence[str]) -> list[Caller | TokenRefused]:
        """The caller behind each, in a look that those share who are at work here and would come soon: of many clients
        at once each would come alone, time and again.
        """
        now, forgotten = monotonic(), self._forgotten
        texts = [*dict.fromkeys((*asked, *self._soon(now)))]
        with self.database.read() as session:
            found = dict(zip(texts, authenticate_all(session, texts, self.clock()), strict=True))
        for text, caller in found.items():
            if isinstance(caller, Caller):
                self._remember(text, caller, now, forgotten)
            else:
                with self._lock:
                    self.callers.pop(text, None)
        return [found[text] for text in asked]

    def _soon(self, now: float) -> list[str]:
        """Tokens that asked for something since they were looked up, which was a moment ago, and are to be again."""
        found: list[str] = []
        with self._lock:
            for text, known in reversed(self.callers.items()):  # the last ones first
                if known.until <= now - _TOKEN_TTL_S or len(found) == _ALONG:
                    break
                if known.asked and known.until < now + _TOKEN_TTL_S / 2 and not is_jwt(text):
                    found.append(text)
        return found

    def _signed_in(self, provider: Provider, token: str) -> Caller:
        """Who signed in at the identity provider; written down when they are new, or their claims changed."""
        found, now = provider.person(token), self.clock()
        with self.database.read() as session:
            caller = tokens.person(session, found.id, found.name, found.scopes, now, keep=False)
        while caller is None:
            with suppress(WriteConflict), self.database.write() as session:  # first sign-ins of one person at once
                caller = tokens.person(session, found.id, found.name, found.scopes, now, keep=True)
        return replace(caller, expires_at=found.until)

    def _note_use(self, caller: Caller) -> None:
        """Write down the use, about once a minute and token, as soon as the clerk comes to it."""
        now = self.clock()
        last = max(filter(None, (caller.last_used_at, self._noted.get(caller.token_id))), default=None)
        if last is not None and now - last < LAST_USE_EVERY:
            return
        self._noted = {token: at for token, at in self._noted.items() if now - at < LAST_USE_EVERY}
        self._noted[caller.token_id] = now

        def write() -> None:
            with suppress(Unavailable), self.database.write() as session:
                note_use(session, caller.token_id, now)

        with suppress(RuntimeError):  # the process ends
            self._clerk.submit(write)

    def close(self) -> None:
        """Let the clerk finish, and give connections back."""
        self._clerk.shutdown()
        super().close()

    async def sign_in(self, token: str, address: str) -> Caller:
        """`caller`, unless too many tokens were refused that came from ``address``.

        Counted are refusals of an address, and of one token's public part from there: so one job with an old token
        does not lock its neighbours out at once, and nobody elsewhere can lock a token out by guessing at it. Processes
        that share a Redis count together.
        """
        most = self.settings.failed_sign_ins
        if not most:
            return await self._caller(token)
        one = max(1, most // 6)
        public = "_".join(token.split("_")[:2])[:21]
        of_address = f"refused:{address}"
        rates = {of_address: Rate(most / 60, most), f"{of_address} {public}": Rate(one / 60, one)}
        if wait := max([await self.limits.wait(key, rate) for key, rate in rates.items()]):
            raise SignInsLimited(address=address, retry_after=math.ceil(wait))
        try:
            return await self._caller(token)
        except TokenRefused:
            for key, rate in rates.items():
                await self.limits.take(key, rate)
            raise

    async def count(self, caller: Caller) -> None:
        """`RateExceeded` when the token asks more often than it may."""
        if per_s := self.settings.rate:
            wait = await self.limits.take(f"token:{caller.token_id}", Rate(per_s, 2 * per_s))
            if wait:
                raise RateExceeded(id=caller.token_id, per_s=per_s, retry_after=math.ceil(wait))

    def known(self, token: str) -> Caller | None:
        """The caller behind ``token`` if it is remembered; asks nobody."""
        with self._lock:
            known = self.callers.get(token)
            if known is None or known.until <= monotonic():
                return None
            known.asked = True
            return known.caller

    def forget(self, token_id: str) -> None:
        """Drop what is remembered of a token, after its revocation on this process."""
        with self._lock:
            self._forgotten += 1
            for text in [text for text, known in self.callers.items() if known.caller.token_id == token_id]:
                del self.callers[text]


def parts(request: Request) -> AppParts:
    """The parts of the app that serves ``request``."""
    found: AppParts = request.app.state.parts
    return found


def anyone(request: Request) -> Caller:
    """The caller behind the bearer token, user or worker; `TokenMissing`, `TokenRefused`."""
    return parts(request).caller(_bearer(request))


def user(caller: Caller) -> Caller:
    """A user's token; a worker's is refused: it can do nothing but its claimed work."""
    if caller.kind != "user":
        raise ScopeMissing(scope="read", namespace="*", granted="the kind 'worker'")
    return caller


def worker(caller: Caller) -> Caller:
    """A worker's token."""
    if caller.kind != "worker":
        raise ScopeMissing(scope="worker", namespace="*", granted="the kind 'user'")
    return caller


# As dependencies these are coroutines: who is remembered is found without a detour through a thread.


async def _parts(request: Request) -> AppParts:
    return parts(request)


async def known_caller(request: Request) -> Caller:
    """`anyone`, without a thread for who is remembered; each request is counted once."""
    if (counted := request.scope.get("caller")) is not None:
        who: Caller = counted
        return who
    found, token = parts(request), _bearer(request)
    address = request.client.host if request.client is not None else "nowhere"
    caller = found.known(token) or await found.sign_in(token, address)
    await found.count(caller)
    request.scope["caller"] = caller
    return caller


async def _in_turn(request: Request, _: Annotated[Caller, Depends(known_caller)]) -> AsyncIterator[AppParts]:
    found = parts(request)  # who asks is known by now: to find out takes a turn itself
    async with found.turns.turn():
        yield found


async def _user(request: Request) -> Caller:
    return user(await known_caller(request))


async def _worker(request: Request) -> Caller:
    return worker(await known_caller(request))


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise TokenMissing
    return token.strip()


async def _origin(request: Request) -> Origin:
    """What this request is to the work that it asks for."""
    return Origin(request.scope["request_id"], traces.current())


Asked = Annotated[Origin, Depends(_origin)]
Parts = Annotated[AppParts, Depends(_parts)]
InTurn = Annotated[AppParts, Depends(_in_turn, scope="function")]
"""The parts in a turn (`Turns`): for routes that ask the database and wait for nothing else, but for a row's lock."""
Anyone = Annotated[Caller, Depends(known_caller)]
User = Annotated[Caller, Depends(_user)]
Worker = Annotated[Caller, Depends(_worker)]
