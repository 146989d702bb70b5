"""An executor whose stages can be started again, over threads: ``Executor``'s whole contract, told when to die."""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue

from llm_engine.core.step import StepPlan, StepResult
from llm_engine.engine.engine import Engine
from llm_engine.engine.executors.base import Collected, Executor, ExecutorInfo, StageDied, StagesUp, Wake
from llm_engine.engine.executors.inproc import InprocExecutor
from llm_engine.engine.executors.registry import ExecutorSpec, make_inproc

PUMP_SECONDS = 0.02


class MortalExecutor(Executor):
    """A fresh ``InprocExecutor`` for each life. ``kill`` ends one, ``hold`` keeps the next from beginning."""

    def __init__(self, spec: ExecutorSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        """Covers ``_life``, ``_inner`` and ``_epoch``."""
        self._life = 0
        self._inner: InprocExecutor | None = None
        self._epoch = 0
        self._events: SimpleQueue[StepResult | Wake | StageDied | StagesUp] = SimpleQueue()
        self._wake_pending = threading.Lock()
        self._may_begin = threading.Event()
        self._may_begin.set()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.restartable = True
        self.restart_error: Exception | None = None
        """Raised by the next ``restart``."""
        self.start_errors: list[str] = []
        """Why the next lives end before they begin."""
        self.restarts: list[int] = []
        """Epochs that were asked for."""
        self.dropped: list[StepPlan] = []
        """Plans of an epoch that was over when they were pushed."""

    # -- commands of a test

    def kill(self, cause: str = "it was killed", stage: int = 0) -> None:
        """A stage is dead; what it had is lost. Any thread."""
        with self._lock:
            self._end_life()
            self._events.put(StageDied(stage, cause))

    def hold(self) -> None:
        """No stage comes back until ``release``."""
        self._may_begin.clear()

    def release(self) -> None:
        self._may_begin.set()

    # -- the contract

    @property
    def num_stages(self) -> int:
        return self._spec.config.parallel.pipeline_parallel_size

    @property
    def can_restart(self) -> bool:
        return self.restartable

    def start(self) -> ExecutorInfo:
        inner = make_inproc(self._spec)
        assert isinstance(inner, InprocExecutor)
        info = inner.start()
        self._live(inner, 0)
        return info

    def push(self, plan: StepPlan) -> None:
        with self._lock:
            if self._inner is not None and plan.epoch == self._epoch:
                self._inner.push(plan)
            else:
                self.dropped.append(plan)

    def collect(self, timeout: float | None) -> Collected:
        try:
            event = self._events.get(timeout=timeout)
        except Empty:
            return None
        if isinstance(event, Wake):
            self._wake_pending.release()
        return event

    def wake(self) -> None:
        if self._wake_pending.acquire(blocking=False):
            self._events.put(Wake())

    def restart(self, epoch: int) -> None:
        self.restarts.append(epoch)
        if self.restart_error is not None:
            raise self.restart_error
        with self._lock:
            self._end_life()
            life = self._life
        thread = threading.Thread(target=self._begin, args=(epoch, life), name="mortal-restart", daemon=True)
        self._threads.append(thread)
        thread.start()

    def shutdown(self) -> None:
        self._over.set()
        self._may_begin.set()
        with self._lock:
            self._end_life()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), thread

    # -- inside

    def _end_life(self) -> None:
        self._life += 1
        inner, self._inner = self._inner, None
        if inner is not None:
            thread = threading.Thread(target=inner.shutdown, name="mortal-shutdown", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _begin(self, epoch: int, life: int) -> None:
        self._may_begin.wait()
        if self._over.is_set():
            return
        if self.start_errors:
            self._events.put(StageDied(0, self.start_errors.pop(0)))
            return
        inner = make_inproc(self._spec)
        assert isinstance(inner, InprocExecutor)
        inner.start()
        with self._lock:
            late = self._life != life
        if late:
            inner.shutdown()
        else:
            self._live(inner, epoch)
            self._events.put(StagesUp(epoch))

    def _live(self, inner: InprocExecutor, epoch: int) -> None:
        with self._lock:
            self._inner, self._epoch = inner, epoch
            life = self._life
        thread = threading.Thread(target=self._pump, args=(inner, life), name="mortal-pump", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _pump(self, inner: InprocExecutor, life: int) -> None:
        while True:
            event = inner.collect(PUMP_SECONDS)
            with self._lock:
                if self._life != life:
                    return
                if isinstance(event, StepResult | StageDied):
                    self._events.put(event)
                if isinstance(event, StageDied):
                    self._end_life()
                    return


def mortal(engine: Engine) -> MortalExecutor:
    executor = engine._executor
    assert isinstance(executor, MortalExecutor)
    return executor


def await_epoch(engine: Engine, epoch: int, *, up: bool = True, seconds: float = 20.0) -> None:
    """Until the books are in this epoch, with stages or without."""
    deadline = time.monotonic() + seconds
    with engine.state.changed:
        core = engine.state.core
        while (core.epoch, core.stages_up) != (epoch, up):
            left = deadline - time.monotonic()
            assert left > 0, (core.epoch, core.stages_up)
            engine.state.changed.wait(left)
