"""Who computes first where the engine's thread and its stages share all CPUs there are."""

from __future__ import annotations

import contextlib
import os
import threading

from .zmq_bringup import StageSettings


class StagesFirst:
    """Between ``begin`` and ``end`` the calling thread, when it wakes, interrupts nobody: it waits for a free CPU or
    for its turn (``SCHED_BATCH``).

    Only where stages are pinned to every CPU that it has and plans are made ahead: the first stage's tokens come at the
    same moment as their result, and as a rule nobody waits for the result then; where somebody does, since few requests
    leave nothing to plan ahead, stages stand still and leave it a CPU. Only the system's default policy is changed.
    """

    def __init__(self, settings: StageSettings) -> None:
        placements = settings.placements.values()
        self._pinned = frozenset[int]().union(*(placement.cpus or () for placement in placements))
        self._is_ahead = settings.config.scheduler.schedule_ahead
        self._thread: int | None = None
        """Whose policy was changed, by the system's number."""

    def begin(self) -> None:
        """Callable twice."""
        if not self._is_ahead or not self._pinned >= os.sched_getaffinity(0):
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
