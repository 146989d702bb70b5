"""With real threads: abort, finish, pause, result, shutdown, death and return of a stage, in every order there is.

Two requests run on two stages. One, "held", decodes but is left alone by the scheduler, so that it can be paused. The
other, "busy", has a step at the valve, two tokens before its end: the first one let through is the ``result``, the
second the ``finish``. Each event has happened before the next one is caused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import permutations

import pytest

from llm_engine import EngineDeadError, FinishReason, RequestOutput
from llm_engine.core.request import RequestState
from llm_engine.engine.engine import Engine
from tests.engine.engines import SECONDS, Commanded, Valve, await_state, await_true, greedy, tokens_of, toy_llm
from tests.engine.mortal import mortal
from tests.quick import some_quick
from tests.toy_model_engine import expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")

HELD, BUSY = [1, 2, 3], [4, 5, 6, 7]
EVENTS = ("abort", "finish", "pause", "result", "shutdown", "death")


class Scene:
    def __init__(self, abort: str, executor: str = "inproc") -> None:
        self.valve = Valve()
        self.llm = toy_llm(
            stages=2, on_forward=self.valve, scheduler="tests.engine.engines:Commanded", max_num_batched_tokens=16,
            executor=executor,
        )  # fmt: skip
        self.engine: Engine = self.llm.engine
        self.core = self.engine.state.core
        assert isinstance(self.core.scheduler, Commanded)
        self.scheduler = self.core.scheduler
        self.aborted = abort
        self.over = False
        self.closing: threading.Thread | None = None
        self.scheduler.held.add(0)
        self.held = self.llm.submit(HELD, greedy(9))
        self.valve.await_arrival(1)
        self.busy = self.llm.submit(BUSY, greedy(3))
        await_state(self.engine, lambda: len(self.core.in_flight) == 2)
        self.valve.let_through()
        self.valve.await_arrival(2)
        self.valve.let_through()
        self.valve.await_arrival(3)
        assert self._state(0) is self._state(1) is RequestState.DECODING
        assert not self.core.table.is_in_flight(self.core.table[0])

    def _state(self, request_id: int) -> RequestState | None:
        request = self.core.table.get(request_id)
        return request.state if request is not None else None

    def _settle(self, condition: Callable[[], bool]) -> None:
        """Until it is so and the scheduling thread has done all it can: whether a step is at the valve is certain."""
        state, thread = self.engine.state, self.engine._scheduling
        await_state(self.engine, lambda: condition() and thread._seen == state.version)

    def abort(self) -> None:
        request_id, future = (0, self.held) if self.aborted == "held" else (1, self.busy)
        future.cancel()
        if not self.over:
            self._settle(lambda: self._state(request_id) is None)

    def pause(self) -> None:
        """At once, or as soon as it is not in flight any more."""
        with self.engine.state.changed:
            self.scheduler.to_pause.add(0)
            held = self.core.table.get(0)
            at_once = held is not None and held.is_resident and not self.core.table.is_in_flight(held)
        self.engine.state.notify()
        if at_once and not self.over:
            self._settle(lambda: self.core.num_preemptions == 1)

    def result(self) -> None:
        """The step at the valve comes back."""
        with self.engine.state.changed:
            flights = list(self.core.in_flight)
        if flights and not self.over:
            self.valve.let_through()
            self._settle(lambda: flights[0] not in self.core.in_flight)

    finish = result

    def shutdown(self) -> None:
        self.over = True
        self.closing = threading.Thread(target=self.llm.close)
        self.closing.start()
        await_true(lambda: self.engine.state.stopping)

    def death(self) -> None:
        self.valve.kill()
        with self.engine.state.changed:
            kills = bool(self.core.in_flight) and not self.over
        if kills:
            self.over = True
            await_true(lambda: self.engine.state.dead is not None)

    def end(self) -> None:
        """Let everything go, and see that everybody was told the right thing."""
        with self.engine.state.changed:
            self.scheduler.held.clear()
        self.engine.state.notify()
        self.valve.open()
        self._check(self.held, HELD, 9)
        self._check(self.busy, BUSY, 3)
        if self.engine.is_ready:
            await_state(self.engine, lambda: self.core.is_idle)
            assert self.core.kv.usage == 0.0
            self.core.check_integrity()
        self.llm.close()
        if self.closing is not None:
            self.closing.join(SECONDS)
            assert not self.closing.is_alive()

    def _check(self, future: Future[RequestOutput], prompt: list[int], count: int) -> None:
        assert wait([future], SECONDS).done, "nobody was told"
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            assert isinstance(error, EngineDeadError), error
            assert self.engine.state.over
            return
        output = future.result()
        assert output.outputs[0].finish_reason is FinishReason.LENGTH
        assert tokens_of(output) == expected_tokens(prompt, count)


class MortalScene(Scene):
    """Here the stages come back after their death, at the event ``comeback``."""

    def __init__(self, abort: str) -> None:
        super().__init__(abort, executor="tests.engine.mortal:MortalExecutor")
        self.executor = mortal(self.engine)

    def death(self) -> None:
        self.executor.hold()
        with self.engine.state.changed:
            at_the_valve = bool(self.core.in_flight)
        self.valve.kill()
        if not self.over:
            if not at_the_valve:
                self.executor.kill()
            self._settle(lambda: not self.core.stages_up)
            assert not self.core.table.num_resident
            assert not self.llm.is_ready

    def comeback(self) -> None:
        self.valve.heal()
        self.executor.release()
        if not self.over:
            self._settle(lambda: self.core.stages_up)
            assert self.llm.is_ready

    def end(self) -> None:
        assert self.over or (self.core.epoch, self.core.stages_up) == (1, True)
        super().end()


def play(order: tuple[str, ...], abort: str = "busy", scene_of: type[Scene] = Scene) -> None:
    scene = scene_of(abort)
    try:
        for event in order:
            getattr(scene, event)()
        scene.end()
    finally:
        scene.valve.open()
        scene.llm.close()


@pytest.mark.parametrize("first", some_quick(EVENTS, EVENTS[::2]))
@pytest.mark.parametrize("second", EVENTS)
def test_every_order_of_all_six(first: str, second: str) -> None:
    for order in permutations(EVENTS):
        if order[:2] == (first, second):
            play(order)


@pytest.mark.parametrize("order", list(permutations(("abort", "pause", "result", "finish"))))
def test_every_order_where_the_one_that_is_paused_is_aborted(order: tuple[str, ...]) -> None:
    for _ in range(5):
        play(order, abort="held")


def orders_of(*events: str) -> list[tuple[str, ...]]:
    """Every order in which the stages come back after they died; two results are alike."""
    return sorted({order for order in permutations(events) if order.index("death") < order.index("comeback")})


@pytest.mark.parametrize("first", ["abort", "pause", "result", "death"])
@pytest.mark.parametrize("aborted", some_quick(["busy", "held"], ["held"]))
def test_every_order_with_a_death_and_a_return(first: str, aborted: str) -> None:
    for order in orders_of("abort", "pause", "result", "result", "death", "comeback"):
        if order[0] == first:
            play(order, aborted, MortalScene)


@pytest.mark.parametrize("first", ["abort", "pause", "result", "death"])
def test_every_order_with_a_shutdown_between_death_and_return(first: str) -> None:
    for order in orders_of("abort", "pause", "result", "result", "death", "shutdown", "comeback"):
        if order[0] == first and order.index("death") < order.index("shutdown") < order.index("comeback"):
            play(order, scene_of=MortalScene)
