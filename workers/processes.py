"""Processes that end with the one that started them, and hear when it is to end."""

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


class Word:
    """A word that is said once and heard in every process forked since: a byte of shared memory, without any lock.

    So it may be said in a signal's handler.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    def say(self) -> None:
        """From now on it is said."""
        self._shared[0] = 1

    def __call__(self) -> bool:
        """Whether it was said."""
        return self._shared[0] == 1


def die_with(parent: int) -> Callable[[], None]:
    """To be called in a fresh child: from now on it is killed when its parent ends, however that comes about."""
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it ended in between

    return bind
