"""One running engine: its executor, its two threads, and how they start and end. What ``LLM`` drives."""

from __future__ import annotations

import atexit
import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Container, Sequence
from concurrent.futures import Future

from prometheus_client import CollectorRegistry

from ..core.config import EngineConfig
from ..core.errors import EngineDeadError
from ..core.trace import StepStats
from ..core.version import __version__
from ..kvcache.kv_cache_manager import KVCacheManager
from ..kvcache.registry import make_resources
from ..kvcache.resources import BaseResourceManager
from ..metrics.engine_metrics import BooksSample, EngineMetrics
from ..metrics.step_trace import StepTrace
from ..schedulers.limits import Limits
from ..schedulers.registry import find_scheduler
from .assembly import make_core, make_limits
from .executors.base import Executor, ExecutorInfo
from .threads.delivery_thread import DeliveryThread
from .threads.output_thread import OutputThread, shut_down
from .threads.scheduling_thread import SchedulingThread
from .threads.state import EngineState
from .tracing import describe_run

MAX_STATS = 1000
"""Steps that are kept where no trace is asked for."""
JOIN_TIMEOUT = 30.0
_numbers = itertools.count()
_running: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """Starts in its constructor: returns when the model is loaded, raises what start-up raised.

    Any thread may use it. The threads hold the state and the executor, never this object, so a forgotten engine is
    collected and ends.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        on_cuda: bool = False,
        registry: CollectorRegistry | None = None,
        model_name: str = "",
        engine_label: str | None = None,
        resources: Sequence[BaseResourceManager] = (),
    ) -> None:
        self.config = config
        self.registry = registry if registry is not None else CollectorRegistry()
        observed = config.observability
        self.trace = StepTrace(MAX_STATS if observed.trace is None else observed.trace_steps, observed.trace)
        self.stats: deque[StepStats] = self.trace.records
        self._delivery_lock = threading.Lock()
        self._executor = executor
        self.name = f"llm-engine-{next(_numbers)}"
        books = _Books()
        make_state = _StateMaker(config, executor.num_stages, on_cuda, resources)
        self.metrics = EngineMetrics(
            self.registry,
            model_name=model_name,
            version=__version__,
            engine=engine_label,
            num_stages=executor.num_stages,
            max_tenants=observed.metrics_tenants,
            max_priorities=observed.metrics_priorities,
            books=books,
        )
        self._delivery = DeliveryThread(f"{self.name}-delivery")
        self._output = OutputThread(
            executor, make_state, self.metrics, self.stats, f"{self.name}-output", self._delivery.close,
            max_restarts=config.parallel.max_stage_restarts, replay=config.parallel.on_stage_death == "replay",
            at_exit=self.trace.write_at_end,
        )  # fmt: skip
        try:
            self._output.thread.start()
            self.state = books.state = self._output.started.result()
            assert make_state.info is not None
            self.info: ExecutorInfo = make_state.info
            self.trace.metadata = describe_run(self.state.core, self.info, model_name, on_cuda)
            self._scheduling = SchedulingThread(self.state, executor, f"{self.name}-scheduling")
            self._scheduling.thread.start()
        except BaseException:
            self._abandon()
            raise
        self._ender = weakref.finalize(self, _signal_end, self.state, executor)
        self._ender.atexit = False
        _running.add(self)

    @property
    def limits(self) -> Limits:
        return self.state.core.limits

    @property
    def kv(self) -> KVCacheManager:
        """For its constants and pure estimates; its books belong to the state lock."""
        return self.state.core.kv

    @property
    def knows(self) -> Container[str] | None:
        """Of ``priority``, ``deadline_ms`` and ``tenant``, what the scheduler goes by; ``None``: it does not say."""
        scheduler = self.state.core.scheduler
        knows: Container[str] | None = getattr(getattr(scheduler, "ordering", scheduler), "knows", None)
        return knows

    @property
    def dead_cause(self) -> EngineDeadError | None:
        """Why the engine cannot go on; ``None`` while it can."""
        return self.state.dead

    @property
    def is_ready(self) -> bool:
        """Whether a request would be begun now: the engine runs, and its stages are up."""
        return self.state.unready_reason is None

    @property
    def unready_reason(self) -> str | None:
        """Why it is not ready, in a line."""
        return self.state.unready_reason

    def delivery(self) -> DeliveryThread:
        """The thread that resolves futures, started at the first call."""
        with self._delivery_lock:
            if self._delivery.thread.ident is None:
                self._delivery.thread.start()
        return self._delivery

    def close(self) -> None:
        """Stop the threads and the stages, failing what is left. Any thread, any number of times; a callback too."""
        self._ender.detach()
        _signal_end(self.state, self._executor)
        current = threading.current_thread()
        if current not in (self._scheduling.thread, self._output.thread):
            for thread in (self._scheduling.thread, self._output.thread, self._delivery.thread):
                if thread.ident is not None and thread is not current:
                    thread.join(JOIN_TIMEOUT)
        self.metrics.close()
        _running.discard(self)

    def _abandon(self) -> None:
        """End what has started. Where Ctrl-C ended the waiting for it, it is still on its way: it is told to stop, and
        what it comes to in spite of that is ended as soon as it is there."""
        self._output.started.add_done_callback(functools.partial(_end_started, self._executor))
        try:
            if not self._output.started.done():
                shut_down(self._executor)
            if self._output.thread.ident is not None:
                self._output.thread.join(JOIN_TIMEOUT)
        finally:
            self.metrics.close()


def _signal_end(state: EngineState, executor: Executor) -> None:
    """Tell the threads to end, waiting for none of them: safe in a garbage collection."""
    state.stop()
    executor.wake()


def _end_started(executor: Executor, started: Future[EngineState]) -> None:
    if started.exception() is None:
        _signal_end(started.result(), executor)


class _Books:
    """What the metrics ask at a scrape."""

    state: EngineState | None = None

    def __call__(self) -> BooksSample:
        if self.state is None:
            return BooksSample()
        with self.state.changed:
            core = self.state.core
            return BooksSample(
                num_running=core.table.num_resident,
                num_waiting=core.num_waiting,
                kv_usage_ratio=core.kv.usage,
                prefix_queries=core.kv.prefix_queries,
                prefix_hits=core.kv.prefix_hits,
                num_preemptions=core.num_preemptions,
                num_replays=core.num_replays,
                num_stage_restarts=self.state.num_restarts,
                num_stages_up=core.table.num_stages if self.state.unready_reason is None else 0,
                num_in_flight=len(core.in_flight),
            )


class _StateMaker:
    """Builds the books once start-up has found out how many blocks there are. Called by the output thread."""

    def __init__(
        self, config: EngineConfig, num_stages: int, on_cuda: bool, resources: Sequence[BaseResourceManager]
    ) -> None:
        self._config, self._num_stages, self._on_cuda = config, num_stages, on_cuda
        self._resources = [*make_resources(config.scheduler.resources), *resources]
        self._make_scheduler = find_scheduler(config.scheduler, num_stages)
        make_limits(config, 1, on_cuda=on_cuda)  # what cannot be is refused before anything is loaded
        self.info: ExecutorInfo | None = None

    def __call__(self, info: ExecutorInfo) -> EngineState:
        self.info = info
        core = make_core(
            self._config,
            num_kv_blocks=info.num_kv_blocks,
            block_size=info.block_size,
            num_stages=self._num_stages,
            feeds_back=info.feeds_back,
            on_cuda=self._on_cuda,
            sliding_window=info.model.sliding_window,
            active_share=info.model.active_share,
            resources=self._resources,
            make_scheduler=self._make_scheduler,
        )
        return EngineState(core, max_num_waiting=self._config.scheduler.max_num_waiting)


@atexit.register
def _close_running() -> None:
    for engine in list(_running):
        engine.close()
