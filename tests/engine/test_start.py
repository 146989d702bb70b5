"""Start-up that does not come to its end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from llm_engine import LLM
from llm_engine.workers.model_engine import ModelInfo, Progress
from tests.toy_model_engine import ToyModelEngine

from .engines import SECONDS


def test_an_interrupted_start_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, interrupted = threading.Event(), threading.Event()

    class SlowToLoad(ToyModelEngine):
        def load(self, progress: Progress | None = None) -> ModelInfo:
            loading.set()
            assert interrupted.wait(SECONDS)
            return super().load(progress)

    def ctrl_c(self: Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return of_a_future(self, timeout)
        assert loading.wait(SECONDS)
        interrupted.set()
        raise KeyboardInterrupt

    of_a_future = Future.result
    before = set(threading.enumerate())
    monkeypatch.setattr(Future, "result", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        LLM(model_engine=lambda stage: SlowToLoad(stage, 1), num_kv_blocks=50, block_size=4)
    deadline = time.monotonic() + SECONDS
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
