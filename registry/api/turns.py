"""Turns: a few threads at a time do what needs the interpreter.

A thread that asks the database needs the interpreter back at every answer, and where many want it they wait for that
longer than they work. Who has no turn yet waits in the event loop, in the order of asking, and costs nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Turns of ``few`` at once, and of everybody who waited for ``patience_s``.

    So a row's lock or a slow store holds up those who wait for it, and not for ever all who come after them.
    """

    def __init__(self, few: int, patience_s: float) -> None:
        self._places = asyncio.Semaphore(few)
        self._patience_s = patience_s

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the length of the block."""
        placed = await self._placed()
        try:
            yield
        finally:
            if placed:
                self._places.release()

    async def _placed(self) -> bool:
        if not self._places.locked():
            return await self._places.acquire()
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._places.acquire()
        except TimeoutError:
            return False
