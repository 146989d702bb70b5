from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """The test leaves no thread of any engine behind."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while left := [t for t in threading.enumerate() if t not in before and t.name.startswith("llm-engine")]:
        assert time.monotonic() < deadline, left
        gc.collect()
        time.sleep(0.002)
