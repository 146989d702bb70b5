"""A step that takes and frees as much memory as one with logits, and how much of it the system had to hand over."""

from __future__ import annotations

import ctypes
import resource

SIZES = (96 << 20, 48 << 20)
_PR_SET_THP_DISABLE = 41


def pages_of_a_step() -> int:
    """Pages that the system handed over meanwhile; 4 KB each, never the large ones."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = [(libc.malloc(size), size) for size in SIZES]
    for address, size in taken:
        ctypes.memset(address, 1, size)
    for address, _ in taken:
        libc.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
