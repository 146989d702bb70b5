"""What the in-process executor adds to the contract: how it sizes the pool, reports progress, and leaves nothing."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

from llm_engine.core.errors import CapacityError, ConfigError, EngineDeadError
from llm_engine.core.step import StepResult
from llm_engine.engine.executors import inproc
from llm_engine.engine.executors.base import ExecutorInfo
from llm_engine.engine.executors.inproc import InprocExecutor
from llm_engine.workers.model_engine import ModelInfo, Progress
from tests.plans import Planner
from tests.toy_model_engine import Gate, ToyModelEngine, expected_tokens


def started(num_stages: int = 1, free: int = 1 << 20, **kwargs: Any) -> ExecutorInfo:
    """Start, look, stop. The toy keeps 24 bytes a token over all its stages."""
    settings = {"max_num_seqs": 2, "num_stages": num_stages, **kwargs}
    executor = InprocExecutor(lambda i: ToyModelEngine(i, num_stages, free_memory_bytes=free - i), **settings)
    try:
        return executor.start()
    finally:
        executor.shutdown()


def test_the_pool_is_what_was_asked_for() -> None:
    info = started(num_kv_blocks=11)
    assert (info.num_kv_blocks, info.block_size) == (11, 16)
    assert started(num_kv_blocks=11, block_size=32).block_size == 32


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_pools_of_all_stages_share_the_memory(num_stages: int) -> None:
    assert started(num_stages, kv_cache_memory=24 * 16 * 7 + 5).num_kv_blocks == 7
    assert started(num_stages, free=24 * 16 * 7 + num_stages - 1).num_kv_blocks == 7
    assert started(num_stages, free=24 * 16 * 7 + num_stages - 2).num_kv_blocks == 6  # the last stage sees the least


def test_the_automatic_pool_is_no_larger_than_all_requests_can_use() -> None:
    assert started(free=1 << 30).num_kv_blocks == 2 * 512 // 16 + 1
    assert started(free=1 << 30, kv_cache_memory=24 * 16 * 500).num_kv_blocks == 500


def test_too_small_a_pool_is_refused_with_advice() -> None:
    with pytest.raises(CapacityError, match=r"767 bytes are free.*need 768.*block_size"):
        started(free=767)
    with pytest.raises(ConfigError, match=r"kv_cache_memory is 767; allowed: at least 768") as caught:
        started(kv_cache_memory=767)
    assert caught.value.field == "kv_cache_memory"
    with pytest.raises(ConfigError, match="num_kv_blocks"):
        started(num_kv_blocks=1)


def test_progress_grows_to_the_whole_models_bytes() -> None:
    seen: list[tuple[int, int]] = []
    started(2, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (300, 300)


def test_threads_are_named_daemons_and_each_stage_lives_in_its_own() -> None:
    homes: dict[int, set[str]] = {0: set(), 1: set()}

    class Homely(ToyModelEngine):
        def note(self) -> None:
            assert threading.current_thread().daemon
            homes[self.stage].add(threading.current_thread().name)

        def load(self, progress: Progress | None = None) -> ModelInfo:
            self.note()
            return super().load(progress)

        def allocate(self, num_blocks: int, block_size: int) -> None:
            self.note()
            super().allocate(num_blocks, block_size)

        def forward(self, batch: Any, hidden: Any) -> Any:
            self.note()
            return super().forward(batch, hidden)

        def release(self) -> None:
            self.note()
            super().release()

    executor = InprocExecutor(lambda i: Homely(i, 2), num_stages=2, max_num_seqs=2, name="toy")
    executor.start()
    planner = Planner(block_size=16)
    planner.add([1, 2])
    executor.push(planner.plan({1: 2}))
    assert isinstance(executor.collect(10), StepResult)
    executor.shutdown()
    assert homes == {0: {"toy-stage-0"}, 1: {"toy-stage-1"}}


def test_stages_work_at_the_same_time() -> None:
    """The second stage holds step 0 while the first goes on to step 1 over its own buffers."""
    gate, arrivals = Gate(), threading.Semaphore(0)
    hooks = {0: lambda number, batch: arrivals.release(), 1: gate}
    executor = InprocExecutor(
        lambda i: ToyModelEngine(i, 2, on_forward=hooks[i]), num_stages=2, max_num_seqs=8, block_size=4
    )
    executor.start()
    planner = Planner()
    for first in (1, 50):
        planner.add([first, first + 1, first + 2])
    plans = [planner.plan({1: 3}), planner.plan({2: 3})]
    for plan in plans:
        executor.push(plan)
    assert arrivals.acquire(timeout=10)
    assert arrivals.acquire(timeout=10)
    gate.open()
    for plan in plans:
        result = executor.collect(10)
        assert isinstance(result, StepResult)
        planner.enter(plan, result)
    executor.shutdown()
    assert planner.requests[1].outputs == expected_tokens([1, 2, 3], 1)
    assert planner.requests[2].outputs == expected_tokens([50, 51, 52], 1)


def test_shutdown_while_starting_ends_the_start() -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Slow(ToyModelEngine):
        def load(self, progress: Progress | None = None) -> ModelInfo:
            loading.set()
            assert go_on.wait(10)
            return super().load(progress)

    engines = [Slow(i, 2) for i in range(2)]
    executor = InprocExecutor(engines.__getitem__, num_stages=2, max_num_seqs=2)
    raised: list[BaseException] = []

    def start() -> None:
        try:
            executor.start()
        except EngineDeadError as error:
            raised.append(error)

    starter = threading.Thread(target=start)
    starter.start()
    assert loading.wait(10)
    threading.Timer(0.05, go_on.set).start()
    executor.shutdown()
    starter.join(10)
    assert len(raised) == 1
    assert engines[0].released


def test_a_stage_that_will_not_end_is_left_behind_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inproc, "SHUTDOWN_SECONDS", 0.05)
    gate = Gate()
    executor = InprocExecutor(lambda i: ToyModelEngine(on_forward=gate), max_num_seqs=2, block_size=4)
    executor.start()
    planner = Planner()
    planner.add([1, 2])
    executor.push(planner.plan({1: 2}))
    assert gate.waiting.acquire(timeout=10)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        executor.shutdown()
    assert time.monotonic() - began < 5
    assert "llm-engine-stage-0 still computes" in caplog.text
    gate.open()
    for thread in threading.enumerate():
        if thread.name == "llm-engine-stage-0":
            thread.join(10)
            assert not thread.is_alive()


def test_running_threads_keep_nothing_of_the_caller_alive() -> None:
    class Owner:
        def make(self, index: int) -> ToyModelEngine:
            return ToyModelEngine()

        def progress(self, done: int, total: int) -> None:
            pass

    owner = Owner()
    executor = InprocExecutor(owner.make, max_num_seqs=2, progress=owner.progress)
    executor.start()
    threads = [thread for thread in threading.enumerate() if thread.name == "llm-engine-stage-0"]
    executor_gone, owner_gone = weakref.ref(executor), weakref.ref(owner)
    inbox = executor._threads[0].inbox
    del executor, owner
    gc.collect()
    assert executor_gone() is None
    assert owner_gone() is None
    inbox.put(None)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_hidden_states_may_be_numpy_or_torch() -> None:
    torch = pytest.importorskip("torch")
    for hidden in (np.arange(3.0), torch.arange(3.0), None):
        copied = inproc._copy(hidden)
        if hidden is not None:
            hidden[:] = 9.0
            assert copied.tolist() == [0.0, 1.0, 2.0]
            assert type(copied) is type(hidden)
