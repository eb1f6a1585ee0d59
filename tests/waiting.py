"""Waiting for what others do."""

import time
from collections.abc import Callable

PATIENCE_S = 30.0


def wait_for(true: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Come back when it is true; fail when it never is."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, f"not within {patience_s:g} s"
        time.sleep(0.01)
