"""Stages in this process, a thread each: for embedding, for tests, and wherever one stage is enough."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ...core.errors import EngineDeadError
from ...core.step import StepPlan, StepResult
from ...workers.model_engine import ModelEngine, ModelInfo, Progress
from ...workers.sampler import BatchSampler, SamplerFactory
from ...workers.stage import Stage, StageOutput, describe
from .base import Collected, Executor, ExecutorInfo, StageDied, Wake
from .pool import choose_num_blocks, sum_up

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
SHUTDOWN_SECONDS = 10.0


class InprocExecutor(Executor):
    """Runs ``num_stages`` stages as daemon threads named ``{name}-stage-{index}``.

    ``make_model_engine(index)`` makes a stage's model engine. Each stage is made, loaded, run and released in its own
    thread, since torch keeps settings by thread; they load one after the other, so that the last one sees the memory
    that is really left. ``progress`` is called from those threads, never from two at once.

    The pool has ``num_kv_blocks`` blocks where given, else what ``kv_cache_memory`` bytes hold over all stages, else
    what the free memory holds, at most what ``max_num_seqs`` requests of full length can use.

    With ``feeds_back`` plans may be pushed ahead of their tokens (``Stage``).
    """

    def __init__(
        self,
        make_model_engine: Callable[[int], ModelEngine],
        *,
        max_num_seqs: int,
        num_stages: int = 1,
        block_size: int | None = None,
        num_kv_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        make_sampler: SamplerFactory = BatchSampler,
        progress: Progress | None = None,
        feeds_back: bool = True,
        name: str = "llm-engine",
    ) -> None:
        self._num_stages = num_stages
        self._feeds_back = feeds_back
        self._max_num_seqs = max_num_seqs
        self._block_size = block_size if block_size is not None else DEFAULT_BLOCK_SIZE
        self._num_kv_blocks = num_kv_blocks
        self._kv_cache_memory = kv_cache_memory
        self._make_model_engine = make_model_engine
        self._make_sampler = make_sampler
        self._progress = progress
        self._name = name
        self._stopping = threading.Event()
        # Results, wake-ups and deaths in the order they happened: all that the output thread waits on.
        self._events: SimpleQueue[StepResult | Wake | StageDied] = SimpleQueue()
        # Held while a Wake is in the queue. Only ever taken without blocking, so that wake() is safe in a signal
        # handler or a finalizer too.
        self._wake_pending = threading.Lock()
        self._threads: list[_StageThread] = []

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def start(self) -> ExecutorInfo:
        assert not self._threads, "start comes once"
        try:
            self._make_threads()
            infos: list[ModelInfo] = []
            for thread in self._threads:
                infos.append(thread.load(_in_all(self._progress, infos, self._num_stages)))
                if self._stopping.is_set():
                    raise EngineDeadError("the executor was shut down while it started")
            num_blocks = choose_num_blocks(
                infos,
                [""] * len(infos),  # stages in one process share its memory
                block_size=self._block_size,
                max_num_seqs=self._max_num_seqs,
                num_kv_blocks=self._num_kv_blocks,
                kv_cache_memory=self._kv_cache_memory,
            )
            pool = _Pool(num_blocks, self._block_size)
            for thread in self._threads:
                thread.allocate(pool)
        except BaseException:
            self.shutdown()
            raise
        return ExecutorInfo(
            sum_up(infos),
            pool.num_blocks,
            pool.block_size,
            self._num_stages,
            feeds_back=self._feeds_back,
            layers_per_stage=tuple(info.num_layers for info in infos),
        )

    def push(self, plan: StepPlan) -> None:
        self._threads[0].inbox.put(_Work(plan, None))

    def collect(self, timeout: float | None) -> Collected:
        try:
            event = self._events.get(timeout=None if timeout is None else max(timeout, 0.0))
        except Empty:
            return None
        if isinstance(event, Wake):
            self._wake_pending.release()
        return event

    def wake(self) -> None:
        if self._wake_pending.acquire(blocking=False):
            self._events.put(Wake())

    def shutdown(self) -> None:
        self._stopping.set()
        threads = [thread for thread in self._threads if thread.ident is not None]
        for thread in threads:
            thread.inbox.put(None)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                logger.warning("%s still computes after %.0f s and is left behind", thread.name, SHUTDOWN_SECONDS)

    def _make_threads(self) -> None:
        """The last stage first, since each hands its output to the next one's inbox."""
        send: Callable[[Any], None] = self._events.put
        if self._feeds_back and self._num_stages > 1:
            send = _feeding(self._events, self._threads)
        for index in reversed(range(self._num_stages)):
            thread = _StageThread(
                f"{self._name}-stage-{index}", index, self._stage_maker(index), send, self._events.put, self._stopping
            )
            send = thread.inbox.put
            self._threads.insert(0, thread)

    def _stage_maker(self, index: int) -> Callable[[], Stage]:
        make_model_engine, make_sampler = self._make_model_engine, self._make_sampler
        num_stages, max_num_seqs, feeds_back = self._num_stages, self._max_num_seqs, self._feeds_back
        return lambda: Stage(
            make_model_engine(index),
            make_sampler,
            index=index,
            num_stages=num_stages,
            max_num_seqs=max_num_seqs,
            feeds_back=feeds_back,
        )


@dataclass(frozen=True, slots=True)
class _Pool:
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class _Fed:
    """From the last stage to the first: what a step sampled."""

    step: int
    tokens: list[int]


@dataclass(slots=True)
class _Work:
    plan: StepPlan
    received: StageOutput | None


class _StageThread(threading.Thread):
    """Owns one stage; knows the queues beside it and nothing of the engine, so it keeps nothing else alive.

    ``inbox`` takes the pool once, then work; ``None`` means stop. ``load`` and ``allocate`` are called by the thread
    that starts the executor, everything else runs here.
    """

    def __init__(
        self,
        name: str,
        index: int,
        make_stage: Callable[[], Stage],
        send: Callable[[Any], None],
        report_death: Callable[[StageDied], None],
        stopping: threading.Event,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.inbox: SimpleQueue[_Pool | _Work | _Fed | None] = SimpleQueue()
        self._index = index
        self._make_stage: Callable[[], Stage] | None = make_stage
        self._progress: Progress | None = None
        self._send = send
        self._report_death = report_death
        self._stopping = stopping
        # ModelInfo, then None once the pool is there; or what went wrong
        self._replies: SimpleQueue[ModelInfo | BaseException | None] = SimpleQueue()

    def load(self, progress: Progress | None) -> ModelInfo:
        """Start the thread and wait until its weights are loaded; raises what the stage raised."""
        self._progress = progress
        self.start()
        info = self._await_reply()
        assert info is not None
        return info

    def allocate(self, pool: _Pool) -> None:
        """Have the stage make its pool; raises what the stage raised."""
        self.inbox.put(pool)
        self._await_reply()

    def run(self) -> None:
        stage: Stage | None = None
        started = False
        try:
            assert self._make_stage is not None
            stage = self._make_stage()
            info = stage.load(self._progress)
            self._make_stage = self._progress = None  # they lead to the caller's objects
            self._replies.put(info)
            pool = self.inbox.get()
            if not isinstance(pool, _Pool):
                raise EngineDeadError(f"stage {self._index} was stopped while it started")
            stage.allocate(pool.num_blocks, pool.block_size)
            self._replies.put(None)
            started = True
            self._serve(stage)
        except BaseException as exc:  # noqa: BLE001 - told to whoever waits for this stage
            if started:
                self._report_death(StageDied(self._index, describe(exc)))
            else:
                self._replies.put(exc)
        finally:
            if stage is not None:
                stage.release()

    def _serve(self, stage: Stage) -> None:
        held: deque[_Work] = deque()
        """Plans made ahead of tokens that have not been fed yet, and those behind them."""
        while (item := self.inbox.get()) is not None and not self._stopping.is_set():
            if isinstance(item, _Fed):
                stage.feed(item.step, item.tokens)
            else:
                assert isinstance(item, _Work)
                held.append(item)
            while held and stage.can_execute(held[0].plan):
                self._execute(stage, held.popleft())

    def _execute(self, stage: Stage, work: _Work) -> None:
        output = stage.execute(work.plan, work.received)
        if isinstance(output, StageOutput):
            # The next stage reads it while this one computes the next step over its own buffers.
            output.hidden = _copy(output.hidden)
            self._send(_Work(work.plan, output))
        else:
            self._send(output)
            stage.catch_up()

    def _await_reply(self) -> ModelInfo | None:
        reply = self._replies.get()
        if isinstance(reply, BaseException):
            raise reply
        return reply


def _feeding(events: SimpleQueue[Any], threads: list[_StageThread]) -> Callable[[StepResult], None]:
    """What the last stage does with a result where the first one goes on from it. Holds nothing of the executor."""

    def send(result: StepResult) -> None:
        threads[0].inbox.put(_Fed(result.step, result.tokens))
        events.put(result)

    return send


def _in_all(progress: Progress | None, loaded: list[ModelInfo], num_stages: int) -> Progress | None:
    """What the next stage reports to: its bytes on top of the loaded stages', those after it taken to be like it."""
    if progress is None:
        return None
    before, left = sum(info.weight_bytes for info in loaded), num_stages - len(loaded)
    return lambda done, total: progress(before + done, before + total * left)


def _copy(hidden: Any) -> Any:
    """A copy of a numpy array or a torch tensor, without importing torch for it."""
    if hidden is None:
        return None
    return hidden.clone() if hasattr(hidden, "clone") else hidden.copy()
