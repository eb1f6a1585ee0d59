"""The app factory: parts, routes, problems, request ids, a bound on bodies.

``uvicorn --factory registry.api.app:create_app``
"""

import gc
import importlib.metadata
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from uuid import uuid4

import structlog
from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from registry import logs, traces
from registry.core.errors import BodyTooLarge, LoractlError, Overloaded, SchemaMissing
from registry.db import migrate
from registry.schemas import is_id, named
from registry.services import tokens
from registry.settings import Settings
from registry.storage.local import LocalStore

from . import (
    adapters,
    audit,
    bases,
    datasets,
    downloads,
    jobs,
    meta,
    policies,
    problems,
    pushes,
    schedules,
    signing,
    upgrades,
    upkeep,
    webhooks,
)
from . import tokens as token_routes
from .deps import AppParts, known_caller
from .document import document
from .metrics import Measured
from .store import store_router

MAX_BODY_BYTES = 64 << 20
log = structlog.get_logger()


def create_app(parts: AppParts | None = None) -> FastAPI:
    """The API over ``parts``; without them a process of its own, over what the environment names."""
    alone = parts is None
    if parts is None:
        settings = Settings.from_environment(os.environ)
        logs.configure(settings.log_level)
        traces.configure(os.environ, "api")
        parts = AppParts.of(settings)
        traces.watch(parts.database.engine)
    app = FastAPI(
        title="loractl",
        version=importlib.metadata.version("loractl"),
        lifespan=_lifespan,
        redirect_slashes=False,
        telemetry=traces.of_requests(),
        openapi_url=None,  # every route but health needs a token, this one too: `meta.openapi`
    )
    app.state.parts = parts
    app.openapi = partial(document, app)  # type: ignore[method-assign]  # FastAPI's own way to say more
    problems.install(app)
    # Routes are tried in this order: what is asked most comes first.
    nouns = (adapters, downloads, pushes, jobs, bases, datasets, policies, upgrades, schedules, token_routes)
    for routes in (*nouns, audit, upkeep, signing, webhooks, meta):
        app.router.routes.extend(routes.router.routes)  # included, each request would be matched against them twice
    if isinstance(parts.store, LocalStore):
        app.router.routes.extend(store_router(parts.store).routes)
    app.add_middleware(Bodies, limit=MAX_BODY_BYTES)
    app.add_middleware(InFlight, limit=parts.settings.in_flight)
    app.add_middleware(RequestIds)
    app.add_middleware(Measured, meters=parts.meters)
    if alone:
        gc.collect()
        gc.freeze()  # what is here now stays: looking through it again and again took one request in 100 0.1 s
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts: AppParts = app.state.parts
    settings, now = parts.settings, parts.clock()
    if lacking := migrate.missing(parts.database):
        raise SchemaMissing(missing=", ".join(lacking))
    with parts.database.write() as session:
        if settings.bootstrap_token:
            tokens.ensure(
                session, settings.bootstrap_token, name="admin", kind="user", scopes={"*": ["admin"]}, now=now
            )
        if settings.bootstrap_worker_token:
            tokens.ensure(
                session,
                settings.bootstrap_worker_token,
                name="worker",
                kind="worker",
                scopes={"queues": ["cpu", "gpu"]},
                now=now,
            )
    yield
    await parts.limits.close()
    parts.close()


class RequestIds:
    """Give every request an id (or keep the caller's), put it in logs and answers, log what took place.

    What a worker's request says of its job in the header ``baggage`` (W3C) is in the lines of its log, too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = sent if is_id(sent) else uuid4().hex
        scope["request_id"] = identity
        about = {"request": identity, **named(headers.get(b"baggage", b"").decode("latin-1"))}
        began, status = time.perf_counter(), 0

        async def mark(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        with bound_contextvars(**about):
            try:
                await self.app(scope, receive, mark)
            finally:
                log.debug(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round(1000 * (time.perf_counter() - began), 1),
                )


class InFlight:
    """Refuse a request at its door once ``limit`` are being answered; what was let in is answered.

    Health is always told, bytes for the local store have a bound of their own, and an answer that only waits for
    events takes no place.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit
        self.now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        free = scope["type"] != "http" or not self.limit or scope["path"].startswith(("/store/", "/health"))
        if free:
            await self.app(scope, receive, send)
            return
        if self.now >= self.limit:
            await _refuse(Overloaded(limit=self.limit, retry_after=1), scope, receive, send)
            return
        held = True
        self.now += 1

        def let_go() -> None:
            nonlocal held
            self.now -= held
            held = False

        async def answer(message: Message) -> None:
            if (b"content-type", b"text/event-stream; charset=utf-8") in message.get("headers", ()):
                let_go()
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            let_go()


class Bodies:
    """Refuse bodies that are too large, or come without a living token, before they are read; then a route is called.

    What goes to the local store is bounded by its signature and passes as it is.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].startswith("/store/"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        if announced or b"transfer-encoding" in headers:
            try:
                await known_caller(Request(scope))
            except LoractlError as error:
                await _refuse(error, scope, receive, send)
                return
        if announced > self.limit:
            await _refuse(self._too_large(scope), scope, receive, send)
            return
        received, answering = 0, False

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._too_large(scope)
            return message

        async def answer(message: Message) -> None:
            nonlocal answering
            if answering or received <= self.limit:  # else it is what the route made of our refusal
                answering = True
                await send(message)

        with suppress(BodyTooLarge):
            await self.app(scope, count, answer)
        if received > self.limit and not answering:
            await _refuse(self._too_large(scope), scope, receive, send)

    def _too_large(self, scope: Scope) -> BodyTooLarge:
        return BodyTooLarge(method=scope["method"], path=scope["path"][:200], limit=self.limit)


async def _refuse(error: LoractlError, scope: Scope, receive: Receive, send: Send) -> None:
    await problems.respond(error, Request(scope))(scope, receive, send)
