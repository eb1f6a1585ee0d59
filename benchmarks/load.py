"""A load generator that is not the bottleneck: keep-alive connections, requests made of bytes beforehand.

Each connection sends a request, reads the whole answer by its Content-Length, and sends the next one. It runs in a
process of its own and reports its own processor time, so that a row can say how much room it had left.
"""

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast
from urllib.parse import urlsplit

from .house import apart

Protocol = TypeVar("Protocol", bound=asyncio.Protocol)
CONNECTIONS = 16
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one round gave."""

    answered: int
    wall_s: float
    first: float
    """Requests per second of the first pass, which asks each request once and is not part of the round."""
    busy: float
    """Share of one core that the generator itself used."""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.answered / self.wall_s


def gets(url: str, paths: Sequence[str], token: str | None = None) -> list[bytes]:
    """GET requests as bytes."""
    host = urlsplit(url).netloc
    access = f"Authorization: Bearer {token}\r\n" if token else ""
    return [f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{access}\r\n".encode() for path in paths]


def rounds(
    targets: dict[str, tuple[str, list[bytes]]], *, times: int, seconds: float, connections: int = CONNECTIONS
) -> dict[str, list[Load]]:
    """Rounds of each target (URL and requests) in turn, so that a slow minute of the machine meets all of them."""
    found: dict[str, list[Load]] = {name: [] for name in targets}
    for _ in range(times):
        for name, (url, requests) in targets.items():
            found[name].append(apart(send, url, requests, seconds=seconds, connections=connections))
    return found


def median(loads: Sequence[Load]) -> float:
    """The rate in the middle."""
    return statistics.median(load.rate for load in loads)


def send(url: str, requests: list[bytes], *, seconds: float, connections: int) -> Load:
    """Keep ``connections`` busy for ``seconds``, once each request had an answer; `RuntimeError` for a refusal."""
    import uvloop

    place = urlsplit(url)
    assert place.hostname is not None and place.port is not None
    return uvloop.run(_send(place.hostname, place.port, requests, seconds, connections))


async def _send(host: str, port: int, requests: list[bytes], seconds: float, connections: int) -> Load:
    loop = asyncio.get_running_loop()
    turn = itertools.cycle(requests)
    made = [_Connection(turn) for _ in range(connections)]
    for connection in made:
        await loop.create_connection(partial(itself, connection), host, port)
    began = time.perf_counter()
    async with asyncio.timeout(PATIENCE_S):
        while sum(c.answered for c in made) < len(requests) and not any(c.refused for c in made):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    first = len(requests) / (time.perf_counter() - began)
    before, began, busy = sum(c.answered for c in made), time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    after, wall, busy = sum(c.answered for c in made), time.perf_counter() - began, time.process_time() - busy
    for connection in made:
        connection.close()
        if connection.refused is not None:
            raise RuntimeError(f"refused: {connection.refused!r}")
    return Load(after - before, wall, first, busy / wall)


def itself(connection: Protocol) -> Protocol:
    """What a loop calls for the protocol of a connection, where that was made beforehand."""
    return connection


class _Connection(asyncio.Protocol):
    def __init__(self, turn: Iterator[bytes]) -> None:
        self._turn = turn
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._lacking = 0
        self.answered = 0
        self.refused: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's own
        self._transport.write(next(self._turn))

    def data_received(self, data: bytes) -> None:
        if self._lacking:
            self._lacking -= len(data)
        else:
            self._head += data
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self.refused = self._head[:2000]
                self.close()
                return
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._lacking, self._head = int(length) - len(body), b""
        if self._lacking == 0:
            self.answered += 1
            if self._transport is not None:
                self._transport.write(next(self._turn))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if self._transport is not None and self.refused is None:
            self.refused = b"the connection was closed"

    def close(self) -> None:
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()
