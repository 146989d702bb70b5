"""What the output thread does when the stages die: how often they are started again, and what is told meanwhile."""

from __future__ import annotations

import logging
from collections import deque

from ...core.errors import EngineDeadError
from ...core.outputs import FinishReason
from ..delta import Delta
from ..executors.base import Executor, StageDied, StagesUp
from .state import EngineState

logger = logging.getLogger(__name__)

RESTART_WINDOW = 300.0
"""Seconds over which restarts are counted."""


class RestartBudget:
    """At most ``max_restarts`` within any ``RESTART_WINDOW``. Time is an argument; output thread."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self._spent: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """Note one more restart; false where there were too many already."""
        while self._spent and now - self._spent[0] >= RESTART_WINDOW:
            self._spent.popleft()
        if len(self._spent) >= self.max_restarts:
            return False
        self._spent.append(now)
        return True


class StageRecovery:
    """Loses the stages and regains them, in the books and at the executor. Output thread.

    A death within the budget, of stages that can be started again, puts the residents back to waiting (or fails them,
    with ``replay`` off) and begins a restart, which ends in ``StagesUp`` or in the next death. Any other ends the
    engine.
    """

    def __init__(self, executor: Executor, *, max_restarts: int = 0, replay: bool = True) -> None:
        self._executor = executor
        self._budget = RestartBudget(max_restarts)
        self._replay = replay
        self._lost_at = 0.0

    def lose(self, state: EngineState, died: StageDied) -> list[Delta]:
        """Take a death in; returns whom it ended. ``restart`` comes next, once they are told."""
        cause, now = f"stage {died.stage} died: {died.cause}", state.clock()
        brief, _, details = cause.partition("\n")
        if not self._executor.can_restart:
            state.die(EngineDeadError(cause))
            return []
        if not self._budget.spend(now):
            limit = f"max_stage_restarts is {self._budget.max_restarts} in {RESTART_WINDOW:.0f} s"
            state.die(EngineDeadError(f"{brief}; the stages are not started again: {limit}\n{details}".rstrip()))
            return []
        with state.changed:
            if state.over:
                return []
            core, replays_before = state.core, state.core.num_replays
            if core.stages_up:
                self._lost_at = now
            core.lose_stages(cause, now, replay=self._replay)
            num_replays = core.num_replays - replays_before
            ended, core.outbox = core.outbox, []
            state.outage = brief
            state.num_restarts += 1
            state.bump()
        num_failed = sum(delta.finish_reason is FinishReason.ERROR for delta in ended)
        logger.warning("%s\nall stages start again; to compute again: %d, failed: %d", cause, num_replays, num_failed)
        return ended

    def restart(self, state: EngineState) -> None:
        """Begin to start the stages again, where ``lose`` decided so."""
        if state.over:
            return
        try:
            self._executor.restart(state.core.epoch)
        except Exception as error:
            raise EngineDeadError(f"{state.outage}; the stages could not be started again: {error!r}") from error

    def regain(self, state: EngineState, up: StagesUp) -> None:
        """The stages are back, unless they were lost once more since."""
        with state.changed:
            if up.epoch != state.core.epoch:
                return
            state.core.regain_stages()
            state.outage = None
            state.bump()
            seconds = state.clock() - self._lost_at
        logger.info("the stages are back after %.1f s", seconds)
