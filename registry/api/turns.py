"""Turns: a few threads at a time do what needs the interpreter.

A thread that asks the database needs the interpreter back at every answer, and where many want it they wait for that
longer than they work. Who has no turn yet waits in the event loop, in the order of asking, and costs nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Turns of ``few`` at once. Who takes longer than ``patience_s`` goes on, but no longer in place of somebody else.

    So a lock or a slow store holds up those who wait for it, and all others once for that long.
    """

    def __init__(self, few: int, patience_s: float) -> None:
        self._places = asyncio.Semaphore(few)
        self._patience_s = patience_s

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the length of the block or of the patience."""
        await self._places.acquire()
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._places.release()

        patience = asyncio.get_running_loop().call_later(self._patience_s, give_back)
        try:
            yield
        finally:
            patience.cancel()
            give_back()
