"""What a process of our own keeps of the memory that a step frees."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_STEPS = """
import json
from llm_engine.core.heap import keep_freed_memory
from tests.freed_memory import pages_of_a_step
if {keep}:
    keep_freed_memory()
print(json.dumps([pages_of_a_step() for _ in range(4)]))
"""


def pages_of_steps(*, keep: bool) -> list[int]:
    """Of each of four like steps in a process of their own."""
    command = [sys.executable, "-c", _STEPS.format(keep=keep)]
    done = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True, timeout=60)
    pages: list[int] = json.loads(done.stdout)
    return pages


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library takes no such wishes")
def test_a_step_finds_the_memory_that_the_one_before_freed() -> None:
    if min(pages_of_steps(keep=False)) < 10_000:
        pytest.skip("nothing to keep: what is freed stays here anyway, or the system does not count")
    first, *others = pages_of_steps(keep=True)
    assert first > 10_000
    assert max(others) < 1000
