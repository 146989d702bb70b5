"""Stages as processes, linked by ZeroMQ sockets: the executor of a pipeline."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Any

import zmq

from ...core.errors import EngineDeadError, EngineError
from ...core.step import StepPlan
from ...workers.model_engine import Progress
from .base import Collected, Executor, ExecutorInfo, StageDied, StagesUp, Wake
from .zmq_group import StageGroup, StageSettings

_TICK = 0.25
"""Seconds between two looks at the stages' health."""
_REAP = 0.02
"""The same while processes are being ended, which are soon gone."""
_SHUTDOWN_SECONDS = 10.0


class ZmqExecutor(Executor):
    """Runs every stage in a process. ``start``, ``collect`` and ``restart`` belong to one thread, which must live as
    long as the stages; ``shutdown`` may come from another one and ends what that one waits for.

    ``step_patience`` is how many seconds a step may take before the stage counts as stuck; it may be set at any time.
    """

    step_patience: float = 30.0

    def __init__(self, settings: StageSettings, progress: Progress | None = None) -> None:
        self._settings = settings
        self._progress = progress
        self._waker = _Waker()
        self._stopping = threading.Event()
        # Held by whoever uses what follows: the output thread nearly always.
        self._owning = threading.RLock()
        self._context: zmq.Context[Any] | None = None
        self._group: StageGroup | None = None
        self._wanted_epoch: int | None = None
        """Set while ``restart`` waits for the old processes' end."""
        self._told_up = self._told_failure = False
        """Whether it has been told that the group is up, or why it failed."""

    @property
    def num_stages(self) -> int:
        return self._settings.config.parallel.pipeline_parallel_size

    def start(self) -> ExecutorInfo:
        with self._owning:
            assert self._group is None, "start comes once"
            try:
                self._context = zmq.Context()
                self._group = group = StageGroup(self._settings, self._context, 0, self._progress)
                while group.info is None:
                    if self._stopping.is_set():
                        raise EngineDeadError("the executor was shut down while it started")
                    if group.failure is not None:
                        raise group.failure.error
                    self._wait(_TICK)
                    group.take_result()
                    group.look(time.monotonic(), self.step_patience)
            except BaseException:
                self.shutdown()
                raise
            self._told_up = True
            return group.info

    def push(self, plan: StepPlan) -> None:
        group = self._group
        if group is not None and group.sender is not None:
            group.sender.send(plan)

    def collect(self, timeout: float | None) -> Collected:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._owning:
            look_at = 0.0
            while True:
                group = self._group
                if group is None:
                    return None
                result = group.take_result()
                if result is not None:
                    return result
                if self._waker.take():
                    return Wake()
                now = time.monotonic()
                if now >= look_at:
                    look_at = now + _TICK
                    group.look(now, self.step_patience)
                event = self._event(now)
                if event is not None:
                    return event
                left = _TICK if deadline is None else min(_TICK, deadline - now)
                if left <= 0 and deadline is not None and now >= deadline:
                    return None
                if self._wait(left):
                    look_at = 0.0

    def wake(self) -> None:
        self._waker.wake()

    @property
    def can_restart(self) -> bool:
        return True

    def restart(self, epoch: int) -> None:
        with self._owning:
            assert self._group is not None, "start comes first"
            # Where it was the books that refused an answer, the stages themselves are well.
            self._group.fail(self.num_stages - 1, "the engine gave it up")
            self._told_failure = True
            self._wanted_epoch = epoch

    def shutdown(self) -> None:
        self._stopping.set()
        self._waker.wake()
        with self._owning:
            if self._group is not None:
                self._group.begin_end()
                self._group.end(_SHUTDOWN_SECONDS)
            self._group = None
            if self._context is not None:
                self._context.destroy(linger=0)
                self._context = None

    def _event(self, now: float) -> Collected:
        """A death or a return that is still to be told; meanwhile the work of restarting goes on."""
        group = self._group
        assert group is not None
        if group.failure is not None:
            if not self._told_failure:
                self._told_failure = True
                return StageDied(group.failure.stage, group.failure.cause)
            if self._wanted_epoch is not None and group.end(0.0):
                return self._begin_again(self._wanted_epoch)
        elif group.info is not None and not self._told_up:
            self._told_up = True
            return StagesUp(group.epoch)
        return None

    def _begin_again(self, epoch: int) -> StageDied | None:
        assert self._context is not None
        self._wanted_epoch = None
        try:
            self._group = StageGroup(self._settings, self._context, epoch, None)
        except (EngineError, OSError, zmq.ZMQError) as error:
            return StageDied(0, f"it could not be started again: {error}")
        self._told_up = self._told_failure = False
        return None

    def _wait(self, seconds: float) -> bool:
        """Until something happens, at most so long. Takes in what stages say; true where a process has ended."""
        group = self._group
        assert group is not None
        poller = zmq.Poller()
        poller.register(self._waker.fd, zmq.POLLIN)
        if group.failure is None:
            poller.register(group.results, zmq.POLLIN)
            poller.register(group.control, zmq.POLLIN)
            for fd in group.pidfds():
                poller.register(fd, zmq.POLLIN)
        else:
            seconds = min(seconds, _REAP)
        ready = dict(poller.poll(math.ceil(max(seconds, 0.0) * 1000)))
        if group.control in ready:
            group.take_control()
        return any(fd in ready for fd in group.pidfds())


class _Waker:
    """Ends a ``collect`` from any thread, signal handler or finalizer: one write, no lock, which counts up to a read.

    The descriptor is closed when nobody can write to it any more: when the object is gone.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        os.eventfd_write(self.fd, 1)

    def take(self) -> bool:
        """Whether it was woken since the last time."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def __del__(self) -> None:
        os.close(self.fd)
