"""What a route needs: the app's parts, the caller behind the token, and who may use which route.

Routes take `Parts` and `User` (or `Worker`), open ``parts.database.read()`` or ``.write()`` themselves
and call one service in it: the end of the write block is the commit. What must follow a commit (waking
workers) comes after the block.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic
from typing import Annotated

from fastapi import Depends, Request

from registry import parts as house
from registry.core.errors import ScopeMissing, TokenMissing
from registry.services.tokens import Caller, authenticate

_TOKEN_TTL_S = 0.8
_TOKENS_KEPT = 4096


@dataclass
class AppParts(house.Parts):
    """The parts of one API process, and the callers it remembers for a moment."""

    callers: OrderedDict[str, tuple[float, Caller]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def caller(self, token: str) -> Caller:
        """The caller behind ``token``, remembered for less than a second: a revocation holds within one."""
        now = monotonic()
        with self._lock:
            known = self.callers.get(token)
        if known is not None and known[0] > now:
            return known[1]
        with self.database.read() as session:
            caller = authenticate(session, token, self.clock())
        with self._lock:
            self.callers[token] = (now + _TOKEN_TTL_S, caller)
            self.callers.move_to_end(token)
            while len(self.callers) > _TOKENS_KEPT:
                self.callers.popitem(last=False)
        return caller

    def forget(self, token_id: str) -> None:
        """Drop what is remembered of a token, after its revocation on this process."""
        with self._lock:
            for text in [text for text, (_, caller) in self.callers.items() if caller.token_id == token_id]:
                del self.callers[text]


def parts(request: Request) -> AppParts:
    """The parts of the app that serves ``request``."""
    found: AppParts = request.app.state.parts
    return found


def anyone(request: Request) -> Caller:
    """The caller behind the bearer token, user or worker; `TokenMissing`, `TokenRefused`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise TokenMissing
    return parts(request).caller(token.strip())


def user(caller: Annotated[Caller, Depends(anyone)]) -> Caller:
    """A user's token; a worker's is refused: it can do nothing but its claimed work."""
    if caller.kind != "user":
        raise ScopeMissing(scope="read", namespace="*", granted="the kind 'worker'")
    return caller


def worker(caller: Annotated[Caller, Depends(anyone)]) -> Caller:
    """A worker's token."""
    if caller.kind != "worker":
        raise ScopeMissing(scope="worker", namespace="*", granted="the kind 'user'")
    return caller


Parts = Annotated[AppParts, Depends(parts)]
Anyone = Annotated[Caller, Depends(anyone)]
User = Annotated[Caller, Depends(user)]
Worker = Annotated[Caller, Depends(worker)]
