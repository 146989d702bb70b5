"""The heap in a process of our own, once all is loaded."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_NEVER = -1
_GROWTH = 64 << 20
"""Bytes for which the allocator asks the system at a time: a few times per load, not per tensor."""


def freeze_heap() -> None:
    """Leave out of every later collection what is there now: modules and the model, which live as long as the process.

    A full collection that visits them stops all threads for 100 to 200 ms. To be called once, when all is loaded, and
    never in a process that is somebody else's: what they drop later in a cycle would stay.
    """
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> None:
    """Have the C library's allocator keep for the next step what a step frees, where it can be told to (glibc).

    Logits are tens of megabytes, made and freed at every step. Without this they go back to the system each time and
    come again page by page, zeroed. For a process whose main thread computes: other threads allocate from arenas of
    64 MB and map what is larger all the same. To be called when weights and pool are there: the large ones were mapped,
    each by itself, and so go back when they are freed. Never in a process that is somebody else's.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(_M_MMAP_MAX, 0)
        tell(_M_TRIM_THRESHOLD, _NEVER)
        tell(_M_TOP_PAD, _GROWTH)
