"""Two hundred clients at once, each with a token of its own, over a registry of 100 000 adapters on PostgreSQL.

One in ten requests writes: an alias moves, or a push is opened. The rest reads metadata: resolve, manifests by digest,
an adapter, its versions, a page of the list. First the clients ask as fast as they are answered, beside an empty route
asked in the same way; then as people's programs do, with a pause between two requests, and every answer is timed. The
clients live in a process of their own on the same machine.
"""

import asyncio
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httpx

from . import fill
from .house import Registry, apart, family, resident
from .load import itself
from .requests import with_an_empty_route
from .table import Row, at_least, at_most

ADAPTERS, CLIENTS = 100_000, 200
PROCESSES = os.cpu_count() or 1
"""Of the API: one a core."""
PAUSE_S = 0.5
MIX = {"resolve": 50, "manifest": 15, "show": 10, "versions": 5, "list": 10, "move": 8, "push": 2}
"""Of a hundred requests."""
WRITES = {"move", "push"}
app = with_an_empty_route


@dataclass
class Told:
    """What a crowd was answered."""

    times: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each answer, by what was asked."""
    errors: Counter[str] = field(default_factory=Counter)
    """Answers that were no success, and connections that were lost."""
    wall_s: float = 0.0

    @property
    def answered(self) -> int:
        return sum(map(len, self.times.values()))

    @property
    def rate(self) -> float:
        return self.answered / self.wall_s

    def quantile(self, share: float, kinds: Callable[[str], bool]) -> float:
        """Milliseconds."""
        found = sorted(t for kind, some in self.times.items() if kinds(kind) for t in some)
        return 1000 * found[min(len(found) - 1, int(share * len(found)))] if found else 0.0


def run(scale: float = 1.0) -> list[Row]:
    adapters, seconds = max(50, int(ADAPTERS * scale)), max(1.0, 30 * min(1.0, scale))
    with (
        tempfile.TemporaryDirectory() as name,
        fill.served(Path(name), f"{__name__}:app", adapters, PROCESSES) as (registry, filled, _),
    ):
        tokens = _tokens(registry)

        def crowd(mix: dict[str, int], *, pause_s: float, seconds: float) -> Told:
            return apart(visit, registry.url, tokens, filled.names, mix, pause_s=pause_s, seconds=seconds)

        def held() -> int:
            return sum(map(resident, family(registry.api)))

        crowd(MIX, pause_s=0.0, seconds=seconds)  # what is remembered is remembered
        before = held()
        empty = crowd({"empty": 1}, pause_s=0.0, seconds=seconds / 3)
        busy = crowd(MIX, pause_s=0.0, seconds=seconds)
        calm = crowd(MIX, pause_s=PAUSE_S, seconds=2 * seconds)
        grown = (held() - before) / 1e6
    reads, writes = (lambda kind: kind not in WRITES), WRITES.__contains__
    wrong = empty.errors + busy.errors + calm.errors
    answers = empty.answered + busy.answered + calm.answered
    named = f"{CLIENTS} clients, {adapters:,} adapters"
    return [
        at_most(f"{named}: metadata read, p99", calm.quantile(0.99, reads), 250, unit="ms",
                note=f"p50 {calm.quantile(0.5, reads):.1f} ms; writes p50 {calm.quantile(0.5, writes):.1f} ms, p99 "
                f"{calm.quantile(0.99, writes):.1f} ms; {calm.rate:,.0f}/s, {PROCESSES} API processes, {PAUSE_S:g} s "
                f"between two requests of a client; clients and PostgreSQL on the same machine"),
        at_most(f"{named}: failed", sum(wrong.values()), 0, unit="requests",
                note=f"of {answers:,}{': ' if wrong else ''}{dict(wrong) if wrong else ''}"),
        at_most(f"{named}: memory gained by the API", max(0.0, grown), 32, unit="MB",
                note=f"from {before / 1e6:.0f} MB, over {busy.answered + calm.answered:,} requests"),
        at_least(f"{named}, no pause: requests per second", busy.rate / empty.rate, 0.1,
                 peer=f"an empty route, {empty.rate:,.0f}/s, p99 {empty.quantile(0.99, bool):.0f} ms",
                 note=f"{busy.rate:,.0f}/s, one in ten a write; reads p50 {busy.quantile(0.5, reads):.0f} ms, p99 "
                 f"{busy.quantile(0.99, reads):.0f} ms, writes p99 {busy.quantile(0.99, writes):.0f} ms"),
    ]  # fmt: skip


def _tokens(registry: Registry) -> list[str]:
    """One for each client."""
    asked = {"name": "client", "scopes": {"*": ["read", "publish", "promote"]}}
    with httpx.Client(base_url=registry.url, headers={"authorization": f"Bearer {registry.token}"}) as client:
        made = [client.post("/v1/tokens", json=asked).raise_for_status().json() for _ in range(CLIENTS)]
    return [one["token"] for one in made]


# ── clients ──────────────────────────────────────────────────────────────────


def visit(
    url: str, tokens: Sequence[str], names: Sequence[tuple[str, str, str]], mix: dict[str, int], *,
    pause_s: float, seconds: float,
) -> Told:  # fmt: skip
    """A client for each token, over a connection of its own, for ``seconds``."""
    import uvloop

    return uvloop.run(_visit(url, tokens, names, mix, pause_s, seconds))


async def _visit(
    url: str, tokens: Sequence[str], names: Sequence[tuple[str, str, str]], mix: dict[str, int], pause_s: float,
    seconds: float,
) -> Told:  # fmt: skip
    loop, place, told = asyncio.get_running_loop(), urlsplit(url), Told()
    assert place.hostname is not None and place.port is not None
    aliased = fill.aliased(names)
    clients = [
        _Client(requests(random.Random(number), place.netloc, token, names, aliased, mix), pause_s, number, told)
        for number, token in enumerate(tokens)
    ]
    began = loop.time()
    for client in clients:
        await loop.create_connection(partial(itself, client), place.hostname, place.port)
    await asyncio.sleep(seconds)
    for client in clients:
        client.leaving = True
    async with asyncio.timeout(60):
        await asyncio.gather(*(client.gone for client in clients))
    told.wall_s = loop.time() - began
    return told


def requests(
    draw: random.Random, host: str, token: str, names: Sequence[tuple[str, str, str]],
    aliased: Sequence[tuple[str, str, str]], mix: dict[str, int],
) -> Iterator[tuple[str, bytes]]:  # fmt: skip
    """What a client asks, for ever: (kind, the request's bytes)."""
    head = f"Host: {host}\r\nAuthorization: Bearer {token}\r\n"
    kinds, weights = list(mix), list(mix.values())
    while True:
        [kind] = draw.choices(kinds, weights)
        name, digest, base = draw.choice(aliased if kind == "resolve" else names)
        method, body = "GET", b""
        match kind:
            case "empty":
                path = "/empty"
            case "resolve":
                path = f"/v1/resolve?ref={name}:prod&base={base}"
            case "manifest":
                path = f"/v1/adapters/{name}/versions/{digest}/manifest"
            case "show":
                path = f"/v1/adapters/{name}"
            case "versions":
                path = f"/v1/adapters/{name}/versions"
            case "list":
                path = f"/v1/adapters?namespace={name.partition('/')[0]}&limit=20"
            case "move":
                method, path = "PUT", f"/v1/adapters/{name}/aliases/canary"
                body = json.dumps({"version": digest, "reason": "a benchmark"}).encode()
            case _:
                method, path = "POST", f"/v1/datasets/{name}/pushes"
                entry = {"path": "data.jsonl", "size": 100, "digest": f"sha256:{draw.getrandbits(256):064x}"}
                body = json.dumps({"manifest": {"kind": "dataset", "files": [entry], "config": {}}}).encode()
        more = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        yield kind, f"{method} {path} HTTP/1.1\r\n{head}{more}\r\n".encode() + body


class _Client(asyncio.Protocol):
    """Asks, waits for the whole answer, rests, asks again."""

    def __init__(self, turn: Iterator[tuple[str, bytes]], pause_s: float, number: int, told: Told) -> None:
        self._turn, self._pause_s, self._told = turn, pause_s, told
        self._draw = random.Random(-1 - number)
        self._loop = asyncio.get_running_loop()
        self._kind, self._asked, self._answer = "", 0.0, b""
        self._transport: asyncio.Transport | None = None
        self.leaving = False
        self.gone: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's own
        self._rest()

    def _rest(self) -> None:
        if self._pause_s:
            self._loop.call_later(self._draw.uniform(0, 2 * self._pause_s), self._ask)
        else:
            self._ask()

    def _ask(self) -> None:
        if self._transport is None:
            return
        if self.leaving:
            self._transport.close()
            return
        self._kind, request = next(self._turn)
        self._asked, self._answer = self._loop.time(), b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not end or len(body) < int(length or 0):
            return
        status = int(head[9:12])
        if status < 400:
            self._told.times.setdefault(self._kind, []).append(self._loop.time() - self._asked)
        else:
            self._told.errors[f"{self._kind} {status} {body[:200].decode()}"] += 1
        self._rest()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if not self.leaving:
            self._told.errors[f"{self._kind}: the connection was closed: {error}"] += 1
        if not self.gone.done():
            self.gone.set_result(None)
