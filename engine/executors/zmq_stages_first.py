"""Who computes first where the engine's thread and its stages share all CPUs there are."""

from __future__ import annotations

import contextlib
import os
import threading

from .zmq_bringup import StageSettings


def stages_have_every_cpu(settings: StageSettings) -> bool:
    """Whether stages are pinned to every CPU that the calling thread has, and their plans are made ahead.

    The first stage's tokens come at the same moment as their result then, on CPUs that all are after, and as a rule
    nobody waits for the result; where somebody does, since few requests leave nothing to plan ahead, stages stand still
    and leave it a CPU. A stage has had more of its CPU than those that sleep most of the time, so the system lets each
    of them interrupt it: not so one of ``SCHED_BATCH``, which waits for a free CPU or for its turn.
    """
    placements = settings.placements.values()
    pinned = frozenset[int]().union(*(placement.cpus or () for placement in placements))
    return settings.config.scheduler.schedule_ahead and pinned >= os.sched_getaffinity(0)


class StagesFirst:
    """Between ``begin`` and ``end`` the calling thread, when it wakes, interrupts nobody, where stages have every CPU.
    Only the system's default policy is changed.
    """

    def __init__(self, settings: StageSettings) -> None:
        self._settings = settings
        self._thread: int | None = None
        """Whose policy was changed, by the system's number."""

    def begin(self) -> None:
        """Callable twice."""
        if not stages_have_every_cpu(self._settings):
            return
        with contextlib.suppress(OSError):  # a sandbox may know no policies
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                self._thread = threading.get_native_id()

    def end(self) -> None:
        """Before it starts a process, which gets what it has. Callable twice; of another thread it changes nothing."""
        if self._thread == threading.get_native_id():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            self._thread = None
