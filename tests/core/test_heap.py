"""What a process of our own keeps of the memory that a step frees."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

_STEPS = """
import ctypes, json, resource, sys
from llm_engine.core.heap import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    logits, scores = libc.malloc(48 << 20), libc.malloc(24 << 20)
    ctypes.memset(logits, 1, 48 << 20), ctypes.memset(scores, 1, 24 << 20)
    libc.free(logits), libc.free(scores)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
print(json.dumps([step() for _ in range(4)]))
"""


def pages_of_steps(how: str) -> list[int]:
    """Pages that each of four like steps had to ask the system for."""
    done = subprocess.run([sys.executable, "-c", _STEPS, how], check=True, capture_output=True, text=True, timeout=60)
    pages: list[int] = json.loads(done.stdout)
    return pages


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library takes no such wishes")
def test_a_step_finds_the_memory_that_the_one_before_freed() -> None:
    first, *others = pages_of_steps("keep")
    assert first > 1000
    assert max(others) < 100
    assert min(pages_of_steps("leave")) > 1000  # else there would be nothing to keep
