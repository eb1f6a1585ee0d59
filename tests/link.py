"""A wire that can be cut: connections go on to the next of its backends, as a load balancer passes them.

    straight    every byte passes at once             slow    a pause before every piece
    cut         nobody gets through                   deaf    connections open, bytes go nowhere (half open)
"""

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Literal

Address = tuple[str, int]
Mode = Literal["straight", "slow", "cut", "deaf"]
PIECE = 1 << 16
CONNECT_S = 2.0
"""How long a backend may take to answer a connection before the next one is asked."""


class Link:
    """Passes connections on; counts connections and bytes, both ways. Used as a context manager."""

    def __init__(self, port: int, backends: Sequence[int | Address], host: str = "127.0.0.1") -> None:
        """From ``port`` of ``host`` on to ``backends``: ports of the loopback interface, or hosts and ports."""
        self.host, self.port, self.backends = host, port, list(backends)
        self.mode: Mode = "straight"
        self.pause_s = 0.05
        self.passed = 0
        self.served = dict.fromkeys(backends, 0)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._ready, self._stop = threading.Event(), asyncio.Event()

    def __enter__(self) -> "Link":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def become(self, mode: Mode) -> None:
        """Change what happens to bytes; ``cut`` and the end of ``deaf`` break the connections that are open."""
        before, self.mode = self.mode, mode
        if "cut" in (mode, before) or before == "deaf":
            self.hang_up()

    def hang_up(self, share: float = 1.0) -> None:
        """Break open connections, or a random share of them, in the middle of whatever they carry."""

        def all_of_them() -> None:
            for writer in list(self._open):
                if random.random() < share:
                    writer.transport.abort()

        self._loop.call_soon_threadsafe(all_of_them)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, self.host, self.port)
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "cut":
            writer.transport.abort()
            return
        self.backends = [*self.backends[1:], self.backends[0]]
        for backend in reversed(self.backends):  # the next that is up, as a load balancer with health checks does
            try:
                host, port = ("127.0.0.1", backend) if isinstance(backend, int) else backend
                back_reader, back_writer = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_S)
                break
            except OSError:
                continue
        else:
            writer.transport.abort()
            return
        self.served[backend] += 1
        self._open |= {writer, back_writer}
        try:
            await asyncio.gather(self._pump(reader, back_writer), self._pump(back_reader, writer))
        finally:
            self._open -= {writer, back_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(PIECE):
                self.passed += len(data)
                if self.mode == "deaf":
                    continue
                if self.mode == "slow":
                    await asyncio.sleep(random.uniform(0, 2 * self.pause_s))
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one side is gone; so is the other then
        finally:
            writer.close()
