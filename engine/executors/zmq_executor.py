"""Stages as processes, linked by ZeroMQ sockets: the executor of a pipeline."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from dataclasses import replace
from typing import Any

import zmq

from ...core.errors import EngineDeadError, EngineError
from ...core.step import StepPlan
from ...workers.fingerprint import fingerprint
from ...workers.model_engine import Progress
from .base import Collected, Executor, ExecutorInfo, StageDied, StagesUp, Wake
from .zmq_bringup import StageSettings
from .zmq_control import Door
from .zmq_group import StageGroup
from .zmq_stages_first import StagesFirst

logger = logging.getLogger(__name__)

_TICK = 0.25
"""Seconds between two looks at the stages' health."""
_REAP_TICK = 0.02
"""The same while processes are being ended, which are soon gone."""
_ANNOUNCE_SECONDS = 3.0
"""After so long it is said which stages of other hosts are waited for."""
_SHUTDOWN_SECONDS = 10.0
_FAREWELL_SECONDS = 5.0
"""How long an engine that ends in an outage waits for stages of other hosts, which come back in less."""
_LOAD_SECONDS = 60.0
"""A start after the first one may take so long, once all stages are there ..."""
_LOAD_FACTOR = 10.0
"""... or so many times as long as the first one, where that is more."""
_LOOK_AGAIN = 60.0
"""Only so that no wait is endless."""


class ZmqExecutor(Executor):
    """Runs every stage in a process. ``start``, ``collect`` and ``restart`` belong to one thread, which must live as
    long as the stages; ``shutdown`` may come from another one and ends what that one waits for.

    ``step_patience`` is how many seconds a step may take before its stage counts as stuck; it may be set at any time.
    """

    step_patience: float = 30.0

    def __init__(self, settings: StageSettings, progress: Progress | None = None) -> None:
        self._settings = settings
        self._progress = progress
        self._stages_first = StagesFirst(settings)
        self._waker = _Waker()
        self._stopping = threading.Event()
        # Held by whoever uses what follows: the output thread nearly always.
        self._owning = threading.RLock()
        self._context: zmq.Context[Any] | None = None
        self._door: Door | None = None
        self._group: StageGroup | None = None
        self._poller = zmq.Poller()
        """Of everything that concerns the group while it lives."""
        self._wanted_epoch: int | None = None
        """Set while ``restart`` waits for the old processes' end."""
        self._give_up_at = math.inf
        """When it has waited long enough."""
        self._told_up = self._told_failure = False
        """Whether it has been told that the group is up, or why it failed."""
        self._look_at = 0.0
        """When the next look at the stages' health is due."""
        self._has_served = False
        self._load_patience = math.inf
        self._announce_at = math.inf

    @property
    def num_stages(self) -> int:
        return self._settings.config.parallel.pipeline_parallel_size

    def start(self) -> ExecutorInfo:
        with self._owning:
            assert self._context is None, "start comes once"
            try:
                self._context = zmq.Context()
                settings = self._settings
                address = settings.config.parallel.pipeline_address
                if address is not None and settings.key is not None:
                    self._door = Door(self._context, address, settings.key)
                if settings.model_path is not None:
                    self._settings = replace(settings, fingerprint=fingerprint(settings.model_path))
                group = self._make_group(0, self._progress)
                while group.info is None:
                    if self._stopping.is_set():
                        raise EngineDeadError("the executor was shut down while it started")
                    if group.failure is not None:
                        raise group.failure.error
                    self._wait(group, _TICK)
                    group.take_result()
                    self._look(group, time.monotonic())
            except BaseException:
                self.shutdown()
                raise
            self._told_up = self._has_served = True
            self._stages_first.begin()
            assert group.load_seconds is not None
            self._load_patience = max(_LOAD_SECONDS, _LOAD_FACTOR * group.load_seconds)
            # The books keep the pool they have: stages that start again get the same, whatever is free by then.
            config = self._settings.config
            cache = replace(config.cache, num_kv_blocks=group.info.num_kv_blocks)
            self._settings = replace(self._settings, config=replace(config, cache=cache))
            return group.info

    def push(self, plan: StepPlan) -> None:
        group = self._group
        if group is not None and group.sender is not None:
            group.sender.send(plan)

    def collect(self, timeout: float | None) -> Collected:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._owning:
            while (group := self._group) is not None and not self._stopping.is_set():
                result = group.take_result()
                now = time.monotonic()
                if now >= self._look_at:  # also where there is always a result
                    self._look_at = now + _TICK
                    self._look(group, now)
                if result is not None:
                    return result
                if self._waker.take():
                    return Wake()
                event = self._event(group)
                if event is not None:
                    return event
                if now >= deadline:
                    return None
                if self._wait(group, min(self._look_at, deadline) - now):
                    self._look_at = 0.0
        return self._waker.wait(deadline)  # before the start, or after the end

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
            self._give_up_at = time.monotonic() + _SHUTDOWN_SECONDS

    def shutdown(self) -> None:
        self._stopping.set()
        self._waker.wake()
        with self._owning:
            self._stages_first.end()
            if self._group is not None:
                self._group.begin_end(final=True)
                if not self._group.end(_SHUTDOWN_SECONDS):
                    logger.error("a stage's process does not end, not even killed")
                self._group = None
            if self._door is not None:
                if self._has_served:  # those of a start that failed wait for the next one
                    self._door.see_off(_FAREWELL_SECONDS)
                self._door.close()
                self._door = None
            if self._context is not None:
                self._context.destroy(linger=0)
                self._context = None

    def _make_group(self, epoch: int, progress: Progress | None) -> StageGroup:
        assert self._context is not None
        self._stages_first.end()
        self._group = StageGroup(self._settings, self._context, epoch, self._door, progress, self._load_patience)
        self._poller = zmq.Poller()
        for source in (self._waker.fd, self._group.results, *self._group.controls, *self._group.pidfds()):
            self._poller.register(source, zmq.POLLIN)
        self._told_up = self._told_failure = False
        self._look_at = 0.0
        self._announce_at = time.monotonic() + _ANNOUNCE_SECONDS
        return self._group

    def _event(self, group: StageGroup) -> Collected:
        """A death or a return that is still to be told; meanwhile the work of restarting goes on."""
        if group.failure is not None:
            if not self._told_failure:
                self._told_failure = True
                return StageDied(group.failure.stage, group.failure.cause)
            if self._wanted_epoch is None:
                return None
            if group.end(0.0):
                epoch, self._wanted_epoch = self._wanted_epoch, None
                try:
                    self._make_group(epoch, None)
                except (EngineError, OSError, zmq.ZMQError) as error:
                    return StageDied(group.failure.stage, f"it could not be started again: {error}")
            elif time.monotonic() >= self._give_up_at:
                self._wanted_epoch = None
                return StageDied(group.failure.stage, "the stages' old processes do not end, not even killed")
        elif group.info is not None and not self._told_up:
            self._told_up = True
            self._stages_first.begin()
            return StagesUp(group.epoch)
        return None

    def _look(self, group: StageGroup, now: float) -> None:
        if group.failure is None:
            group.look(now, self.step_patience)
        if now >= self._announce_at and group.awaited and self._door is not None:
            self._announce_at = math.inf
            stages = ", ".join(map(str, group.awaited))
            logger.warning("waiting for stages to join at %s: %s", self._door.address, stages)

    def _wait(self, group: StageGroup, seconds: float) -> bool:
        """Until something happens, at most so long. Takes in what stages say, unless there is a result to be taken
        first; true where a process has ended."""
        if group.failure is None:
            poller = self._poller
        else:
            poller, seconds = self._waker.poller, min(seconds, _REAP_TICK)
        ready = dict(poller.poll(math.ceil(max(seconds, 0.0) * 1000)))
        if not ready or group.results in ready or group.failure is not None:
            return False
        group.take_control()
        return any(fd in ready for fd in group.pidfds())


class _Waker:
    """Ends a ``collect`` from any thread, signal handler or finalizer: one write, no lock, which counts up to a read.

    The descriptor is closed when nobody can write to it any more: when the object is gone.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.poller = zmq.Poller()
        self.poller.register(self.fd, zmq.POLLIN)

    def wake(self) -> None:
        os.eventfd_write(self.fd, 1)

    def take(self) -> bool:
        """Whether it was woken since the last time."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def wait(self, deadline: float) -> Wake | None:
        """Until it is woken, or the deadline on ``time.monotonic`` has passed."""
        while not self.take():
            left = min(deadline - time.monotonic(), _LOOK_AGAIN)
            if left <= 0:
                return None
            self.poller.poll(math.ceil(left * 1000))
        return Wake()

    def __del__(self) -> None:
        os.close(self.fd)
