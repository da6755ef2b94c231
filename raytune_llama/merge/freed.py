"""Memory that was freed and is kept by the C library, given back to the system."""

import ctypes
from collections.abc import Callable
from functools import lru_cache


def release_free_memory() -> None:
    """Let glibc return free pages; elsewhere nothing happens.

    After some tensors of many sizes it keeps a third more than is in use, and peak memory would
    depend on their order.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
