"""The native kernels as Python functions. They take addresses and sizes, as numpy or torch give them; no torch here.

Each releases the GIL while it runs, writes only what its name says, and uses at most ``threads`` threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

from . import build

FLOAT32, BFLOAT16 = 0, 1

_SIGNATURES: dict[str, list[Any]] = {
    "paged_attention": [c_int, *[c_void_p] * 7, *[c_int64] * 11, c_float, c_float, c_int],
    "add_rms_norm": [c_int, *[c_void_p] * 5, c_int64, c_int64, c_float, c_int],
    "rotate_and_store": [c_int, *[c_void_p] * 9, *[c_int64] * 7, c_float, c_int],
    "gated": [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int],
    "pack_linear": [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int],
    "linear": [c_int, *[c_void_p] * 4, *[c_int64] * 4, c_int],
}


@functools.cache
def function(name: str) -> Callable[..., None] | None:
    """The kernel of this name (``csrc`` says what it takes), or None where there are no native kernels."""
    library = build.library()
    if library is None:
        return None
    found: ctypes._NamedFuncPointer = getattr(library, name)
    found.argtypes, found.restype = _SIGNATURES[name], None
    return found


def packed_linear_size(dtype: int, outputs: int, inputs: int) -> int:
    """Elements of a weight [outputs, inputs] once packed for ``linear``; 0 where there is no such kernel here."""
    library = build.library()
    if library is None:
        return 0
    size = library.packed_linear_size
    size.argtypes, size.restype = [c_int, c_int64, c_int64], c_int64
    return int(size(dtype, outputs, inputs))
