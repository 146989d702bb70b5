"""Asking the system for large pages, where it gives them on request."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable

LARGE_PAGE = 2 << 20


def prefer_large_pages(address: int, size: int) -> None:
    """Ask that memory at ``address`` be backed by large pages; call it before the memory is first written.

    Weights and keys are read through once a step: with small pages a good part of that time goes to translating
    addresses. A wish only: nothing happens where the system has no such pages.
    """
    advise = _madvise()
    first = -(-address // LARGE_PAGE) * LARGE_PAGE
    length = (address + size - first) // LARGE_PAGE * LARGE_PAGE
    if advise is not None and length > 0:
        advise(first, length, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if os.name != "posix" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function
