"""Asking for large pages: a wish, never an error."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from llm_engine.native.memory import LARGE_PAGE, prefer_large_pages


def test_memory_keeps_its_content():
    for size in (1, 100, LARGE_PAGE, 5 * LARGE_PAGE + 77):
        data = torch.arange(size, dtype=torch.int32)
        prefer_large_pages(data.data_ptr(), data.nbytes)
        assert torch.equal(data, torch.arange(size, dtype=torch.int32))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no such request on this system")
def test_the_kernel_is_asked():
    memory = mmap.mmap(-1, 8 * LARGE_PAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    prefer_large_pages(whole.data_ptr(), len(memory))
    middle = whole.data_ptr() + 4 * LARGE_PAGE
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            inside = first <= middle < last
        elif line.startswith("VmFlags") and inside:
            flags = line
    assert " hg" in flags
