"""Work that is spread over threads by us, and not by PyTorch within each of its operations."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def a_core_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute on one core each; in the end what has not begun is dropped."""
    before = torch.get_num_threads()  # a thread's own number is everyone's default
    pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
