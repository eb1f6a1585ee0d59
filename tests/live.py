"""A whole registry behind a real socket, on SQLite and the local store, daemons included; every request is counted."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.client import RegistryClient
from registry.daemons import run as daemons
from registry.db.migrate import upgrade
from registry.services.tokens import make_text
from tests import servers
from tests.world import SETTINGS

PART = 1 << 20
"""The smallest part that the registry hands out."""


@dataclass
class Seen:
    """A request as the server saw it: the body's size as far as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    received: int = 0


@dataclass
class Live:
    """Where the registry is, and what it was asked."""

    url: str
    token: str
    parts: AppParts
    seen: list[Seen] = field(default_factory=list)

    def client(self, token: str | None = None) -> RegistryClient:
        return RegistryClient(self.url, token or self.token)

    def sent(self) -> int:
        """Bytes that the store received."""
        return sum(request.received for request in self.seen if request.path.startswith("/store/"))

    def puts(self) -> list[Seen]:
        return [request for request in self.seen if request.method == "PUT" and request.path.startswith("/store/")]


@contextmanager
def registry(folder: Path, **changes: Any) -> Iterator[Live]:
    """The registry; parts are small, so that small files come in many."""
    token = make_text()
    made: list[Live] = []

    def make_app(url: str) -> ASGIApp:
        settings = replace(
            SETTINGS,
            database_url=f"sqlite:///{folder / 'registry.db'}",
            broker_url="memory://",
            public_url=url,
            data=folder,
            bootstrap_token=token,
            part_size=PART,
            multipart_from=2 * PART,
        )
        parts = AppParts.of(replace(settings, **changes))
        upgrade(parts.database)
        made.append(Live(url, token, parts))
        return _counting(create_app(parts), made[0].seen)

    stop = threading.Event()
    structlog.configure(processors=[_say_nothing])  # stdout belongs to the commands under test
    with servers.served(make_app):
        thread = threading.Thread(target=daemons.run, args=(made[0].parts, stop), name="daemons")
        thread.start()
        try:
            yield made[0]
        finally:
            stop.set()
            thread.join()
            structlog.reset_defaults()


def _say_nothing(*_: object) -> EventDict:
    raise structlog.DropEvent


def _counting(app: ASGIApp, seen: list[Seen]) -> ASGIApp:
    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        request = Seen(scope["method"], scope["path"], headers)
        seen.append(request)

        async def read() -> Message:
            message = await receive()
            request.received += len(message.get("body", b""))
            return message

        async def write(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            await send(message)

        await app(scope, read, write)

    return counted
