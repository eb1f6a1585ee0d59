"""Bodies of answers, remembered by what they were made of.

A key names everything that the body depends on, so nothing has to be told when something changes: the changed thing
asks for another key. What ages by itself (signed URLs) has a life.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from time import monotonic


class Answers:
    """The last ``room`` bodies, of ``most`` bytes together; the ones that were longest not asked for go first."""

    def __init__(self, room: int = 4096, most: int = 32 << 20) -> None:
        self.room, self.most = room, most
        self._bodies: OrderedDict[Hashable, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        """The body kept under ``key``, while it lives."""
        with self._lock:
            until, body = self._bodies.get(key, (0.0, b""))
            if until <= monotonic():
                return None
            self._bodies.move_to_end(key)
            return body

    def keep(self, key: Hashable, body: bytes, life_s: float = float("inf")) -> None:
        """Remember ``body`` for ``life_s``, unless there is no room for it alone."""
        if len(body) > self.most:
            return
        with self._lock:
            self._bytes += len(body) - len(self._bodies.pop(key, (0.0, b""))[1])
            self._bodies[key] = (monotonic() + life_s, body)
            while len(self._bodies) > self.room or self._bytes > self.most:
                _, (_, oldest) = self._bodies.popitem(last=False)
                self._bytes -= len(oldest)
