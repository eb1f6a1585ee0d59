"""Bodies of answers, remembered by what they were made of.

A key names everything that the body depends on, so nothing has to be told when something changes: the changed thing
asks for another key. What ages by itself (signed URLs) has a life.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from time import monotonic


class Answers:
    """The last ``room`` bodies; the ones that were longest not asked for go first."""

    def __init__(self, room: int = 4096) -> None:
        self.room = room
        self._bodies: OrderedDict[Hashable, tuple[float, bytes]] = OrderedDict()
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
        """Remember ``body`` for ``life_s``."""
        with self._lock:
            self._bodies[key] = (monotonic() + life_s, body)
            self._bodies.move_to_end(key)
            while len(self._bodies) > self.room:
                self._bodies.popitem(last=False)
