"""The thread that collects results and brings the books up to date. It alone writes to the requests' sinks."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ...core.outputs import FinishReason
from ...core.step import StepResult
from ...core.trace import StepStats
from ...kvcache.resources import ResourceFailure
from ...metrics.engine_metrics import EngineMetrics
from ..core import EngineCore
from ..delta import Delta
from ..executors.base import Executor, ExecutorInfo, StageDied, StagesUp
from ..retirement import UnexpectedResult
from .patience import step_patience
from .recovery import StageRecovery
from .reporting import deltas_of, record_finished, record_step, stats_of
from .state import EngineState

logger = logging.getLogger(__name__)

COLLECT_TIMEOUT = 5.0
"""Seconds, so that no wait is endless; so often it is looked at how long the steps in flight may take."""

AFTER_YOU = 1e-3
"""Seconds that the scheduling thread is given to push what has become possible, before the deltas are handed out: the
stages wait for the one, and nobody on the way to a socket notices the other. Both want the interpreter lock, which
whoever has it may keep for five milliseconds."""


class OutputThread:
    """Starts the stages, then retires results in order, and at the end fails whoever is left and stops the stages.

    ``make_state`` is called once the stages are up, with what start-up found; ``started`` resolves to the state or
    carries what went wrong. ``at_end`` is called when nothing more will be delivered, ``at_exit`` when the stages are
    stopped too. ``max_restarts`` and ``replay`` are for ``StageRecovery``.
    """

    def __init__(
        self,
        executor: Executor,
        make_state: Callable[[ExecutorInfo], EngineState],
        metrics: EngineMetrics,
        stats: deque[StepStats],
        name: str,
        at_end: Callable[[], None] = lambda: None,
        *,
        max_restarts: int = 0,
        replay: bool = True,
        at_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._executor, self._make_state = executor, make_state
        self._metrics, self._stats = metrics, stats
        self._at_end, self._at_exit = at_end, at_exit
        self._recovery = StageRecovery(executor, max_restarts=max_restarts, replay=replay)
        self._looked_at = -math.inf
        """When it was last seen how long the steps in flight may take."""
        self.started: Future[EngineState] = Future()
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def run(self) -> None:
        """Start-up, the loop, the end."""
        try:
            state = self._make_state(self._executor.start())
            with state.changed:
                self._be_patient(state.core)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            try:
                shut_down(self._executor)
            finally:
                self.started.set_exception(error)
            return
        self.started.set_result(state)
        try:
            while self.collect_once(state, COLLECT_TIMEOUT):
                pass
        except BaseException as error:  # noqa: BLE001 - recorded and told to every waiter
            state.die(error)
        finally:
            self._end(state)

    def collect_once(self, state: EngineState, timeout: float | None) -> bool:
        """Take in one result, wake-up or death, and tell those concerned. False when the engine is over."""
        collected = self._executor.collect(timeout)
        if isinstance(collected, StepResult):
            try:
                self._retire(state, collected, state.clock())
            except UnexpectedResult as error:
                self._lose_stages(state, StageDied(self._executor.num_stages - 1, str(error)))
        elif isinstance(collected, StageDied):
            self._lose_stages(state, collected)
        elif isinstance(collected, StagesUp):
            self._recovery.regain(state, collected)
        else:
            with state.changed:
                self._be_patient(state.core)  # nothing has come for a while, perhaps
                ended, state.core.outbox = state.core.outbox, []
                failures, state.core.resource_failures = state.core.resource_failures, []
            self._deliver(state, ended)
            _log(failures)
        return not state.over

    def _lose_stages(self, state: EngineState, died: StageDied) -> None:
        self._deliver(state, self._recovery.lose(state, died))
        self._recovery.restart(state)

    def _retire(self, state: EngineState, result: StepResult, collected_at: float) -> None:
        state.looked.clear()
        with state.changed:
            now = state.clock()
            retired = state.core.retire(result, now)
            if retired is None:
                return
            failures, state.core.resource_failures = state.core.resource_failures, []
            if now - self._looked_at > COLLECT_TIMEOUT:
                self._looked_at = now
                self._be_patient(state.core)
            retired_at = state.clock()
            state.bump()
        state.looked.wait(AFTER_YOU)
        stats = stats_of(retired, result, collected_at, now, retired_at)
        self._stats.append(stats)
        self._deliver(state, [*deltas_of(retired, result, now), *retired.failed])
        record_step(self._metrics, retired, stats)
        if result.error is not None:
            logger.error("step %d failed, and its requests with it: %s", result.step, result.error)
        _log(failures)

    def _be_patient(self, core: EngineCore) -> None:
        """Tell the executor how long the steps in flight may take. Under the lock; now and then is enough, since none
        is given up sooner than after several such times."""
        plans = [flight.plan for flight in core.in_flight]
        self._executor.step_patience = step_patience(core.table.timing, plans)

    def _deliver(self, state: EngineState, deltas: list[Delta]) -> None:
        """Hand each sink its deltas of this step in one go."""
        by_sink: dict[int, list[Delta]] = {}
        for delta in deltas:
            by_sink.setdefault(id(delta.request.sink), []).append(delta)
        for batch in by_sink.values():
            batch[0].request.sink.deliver(batch)
        ended = [delta for delta in deltas if delta.finish_reason is not None]
        if ended:
            state.answered(delta.request.request_id for delta in ended)
        for delta in ended:
            record_finished(self._metrics, delta)

    def _end(self, state: EngineState) -> None:
        """Nobody is left without an answer, and no stage without an end.

        The books may be what broke, so they are not used again: everybody who was taken in and not answered is told.
        """
        try:
            with state.changed:
                now = state.clock()
                state.stopping = True
                state.bump()
                ended, state.core.outbox = state.core.outbox, []
                told = {delta.request.request_id for delta in ended}
                ended += [
                    Delta(
                        request, [], now, finish_reason=FinishReason.ERROR,
                        error=state.death("the engine was closed before the request finished"),
                    )
                    for request in state.take_everybody() if request.request_id not in told
                ]  # fmt: skip
                problems = [*state.core.resource_failures, *state.core.resources.shutdown()]
            if state.dead is not None:
                logger.critical("%s", state.dead, exc_info=state.dead.__cause__)
            self._deliver(state, ended)
            _log(problems)
        finally:
            self._at_end()
            shut_down(self._executor)
            if state.dead is None:
                self._metrics.close()  # a dead engine's numbers stay to be looked at until it is closed
            self._at_exit()


def shut_down(executor: Executor) -> None:
    """Stop the stages. What an executor raises over it is logged: others wait for what comes after."""
    try:
        executor.shutdown()
    except Exception:
        logger.exception("the executor failed to shut down")


def _log(failures: list[ResourceFailure]) -> None:
    for name, problem in failures:
        logger.error("resource %s failed while it was freed: %r", name, problem)
