"""The thread that schedules and pushes. It never waits for a result."""

from __future__ import annotations

import threading

from ..executors.base import Executor
from .state import EngineState

LOOK_AGAIN = 1.0
"""Seconds after which the version is compared again. A stream that is collected in this very thread, between its look
and its sleep, raises the version unheard; so no wait is endless."""


class SchedulingThread:
    """Waits until the state is newer than its last look, decides, books, pushes."""

    def __init__(self, state: EngineState, executor: Executor, name: str) -> None:
        self._state, self._executor = state, executor
        self._seen = -1
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def run(self) -> None:
        """The loop; ends when the engine stops or dies. What kills it fails every waiter (output thread)."""
        try:
            while self.schedule_once():
                pass
        except BaseException as error:  # noqa: BLE001 - recorded and told to every waiter
            self._state.die(error)
            self._executor.wake()

    def schedule_once(self, *, wait: bool = True) -> bool:
        """Make and push at most one plan; sleeps first when nothing changed since the last look found nothing.

        False when the engine is over. With ``wait=False`` it never sleeps, for tests and simulation.
        """
        state = self._state
        with state.changed:
            while wait and state.version == self._seen and not state.over:
                state.changed.wait(LOOK_AGAIN)
                if not state.core.stages_up:
                    break  # deadlines pass, and nothing that comes back wakes anybody
            if state.over:
                return False
            began, was_idle = state.clock(), state.core.is_idle
            state.drain_inbox(began)
            plan = state.core.schedule(began)
            if plan is None:
                self._seen = state.version
            else:
                flight = state.core.in_flight[-1]
                flight.after_idle = was_idle
                flight.booked_at = state.clock()
            must_wake = bool(state.core.outbox)
        if plan is not None:
            self._executor.push(plan)
            flight.pushed_at = state.clock()  # nobody else writes it; a result that was faster reads 0
        state.looked.set()
        if must_wake:
            self._executor.wake()
        return True
