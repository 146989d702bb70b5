"""With real threads: many callers, callbacks, cancellation, the death of each thread, the silence of an idle engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import Future, wait
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llm_engine import EngineDeadError, FinishReason, RequestOutput, SchedulerError
from llm_engine.engine.threads.output_thread import COLLECT_TIMEOUT
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.engine.engines import (
    SECONDS,
    Valve,
    await_state,
    await_true,
    engine_threads,
    greedy,
    tokens_of,
    toy_llm,
)
from tests.toy_model_engine import expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")

REPEATS = 20


def prompt_of(number: int) -> list[int]:
    """Some share their first blocks."""
    return [number % 5, 7, 7, 7, number % 3, 8, 8, 8, number % 97, number % 11]


# -- many callers


@pytest.mark.parametrize("stages", [1, 3])
def test_64_threads_get_what_a_serial_run_gives(stages: int) -> None:
    problems: list[str] = []
    with toy_llm(stages=stages, num_kv_blocks=60, max_num_seqs=12) as llm:

        def check(number: int, how: str, tokens: list[int], count: int) -> None:
            if tokens != expected_tokens(prompt_of(number), count):
                problems.append(f"{how} {number}: {tokens}")

        def generate(number: int) -> None:
            outputs = llm.generate([prompt_of(number), prompt_of(number + 1)], greedy(6), use_tqdm=False)
            for offset, output in enumerate(outputs):
                check(number + offset, "generate", tokens_of(output), 6)

        def stream(number: int) -> None:
            parts = list(llm.stream(prompt_of(number), greedy(9)))
            check(number, "stream", [token for part in parts for token in tokens_of(part)], 9)

        def submit(number: int) -> None:
            called = threading.Event()
            outputs: list[RequestOutput] = []

            def keep(future: Future[RequestOutput]) -> None:
                outputs.append(future.result())
                called.set()

            llm.submit(prompt_of(number), greedy(7)).add_done_callback(keep)
            assert called.wait(SECONDS)
            check(number, "submit", tokens_of(outputs[0]), 7)

        def cancel(number: int) -> None:
            stream = llm.stream(prompt_of(number), greedy(200))
            seen = tokens_of(next(stream))
            stream.cancel()
            for part in stream:
                seen += tokens_of(part)
            if seen != expected_tokens(prompt_of(number), 200)[: len(seen)] or not stream.finished:
                problems.append(f"cancel {number}: {seen}")

        ways = (generate, stream, submit, cancel)

        def call(number: int) -> None:
            try:
                for turn in range(3):
                    ways[(number + turn) % 4](number * 3 + turn)
            except BaseException as error:  # noqa: BLE001 - told below
                problems.append(f"{number}: {error!r}")

        callers = [threading.Thread(target=call, args=(number,)) for number in range(64)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert not any(caller.is_alive() for caller in callers)
        assert problems == []
        await_state(llm.engine, lambda: llm.engine.state.core.is_idle)
        llm.engine.state.core.check_integrity()
        assert llm.engine.kv.usage == 0.0


def test_many_engines_in_one_process_share_a_registry() -> None:
    registry = CollectorRegistry()
    engines = [toy_llm(registry=registry, engine_label=f"number-{index}") for index in range(4)]
    futures = [llm.submit(prompt_of(index), greedy(5)) for index, llm in enumerate(engines) for _ in range(index + 1)]
    assert not wait(futures, SECONDS).not_done
    for index, llm in enumerate(engines):
        labels = {"model_name": "custom", "engine": f"number-{index}", "reason": "length"}
        await_true(
            lambda labels=labels, n=index + 1: (
                registry.get_sample_value("llm_engine_requests_finished_total", labels) == n
            )
        )
        assert llm.registry is registry
    engines[0].close()
    assert tokens_of(engines[1].generate([prompt_of(1)], greedy(3), use_tqdm=False)[0]) == expected_tokens(
        prompt_of(1), 3
    )
    for llm in engines:
        llm.close()
    gone = {"model_name": "custom", "engine": "number-0", "reason": "length"}
    assert registry.get_sample_value("llm_engine_requests_finished_total", gone) is None


# -- futures and callbacks


def test_a_callback_may_close_the_engine() -> None:
    for _ in range(REPEATS):
        llm = toy_llm()
        closed = threading.Event()

        def close(_: object, llm: Any = llm, closed: threading.Event = closed) -> None:
            llm.close()
            closed.set()

        first = llm.submit([1, 2], greedy(2))
        first.add_done_callback(close)
        rest = [llm_submit_or_dead(llm, [3, 4 + n], 300) for n in range(3)]
        assert closed.wait(SECONDS)
        assert tokens_of(first.result(SECONDS)) == expected_tokens([1, 2], 2)
        for future in rest:
            assert future is None or isinstance(future.exception(SECONDS), EngineDeadError)
        await_true(lambda llm=llm: not engine_threads(llm.engine))


def llm_submit_or_dead(llm: Any, prompt: list[int], count: int) -> Future[RequestOutput] | None:
    try:
        return llm.submit(prompt, greedy(count))  # type: ignore[no-any-return]
    except EngineDeadError:
        return None


@pytest.mark.parametrize("raised", [ValueError("mine"), SystemExit(3)])
def test_a_callback_that_raises_harms_nobody(raised: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise raised

    with toy_llm() as llm:
        llm.submit([1, 2], greedy(2)).add_done_callback(fail)
        assert tokens_of(llm.submit([3, 4], greedy(4)).result(SECONDS)) == expected_tokens([3, 4], 4)
        assert llm.is_ready
    assert "callback" in caplog.text


def test_a_callback_may_ask_for_more() -> None:
    with toy_llm() as llm:
        chain: Future[list[int]] = Future()

        def again(done: Future[RequestOutput]) -> None:
            tokens = tokens_of(done.result())
            if len(tokens) < 6:
                llm.submit([1, 2], greedy(len(tokens) + 1)).add_done_callback(again)
            else:
                chain.set_result(tokens)

        llm.submit([1, 2], greedy(1)).add_done_callback(again)
        assert chain.result(SECONDS) == expected_tokens([1, 2], 6)


def test_cancelling_a_future_ends_the_request_and_wakes_who_waits_for_it() -> None:
    for _ in range(REPEATS):
        valve = Valve()
        with toy_llm(on_forward=valve) as llm:
            future = llm.submit([1, 2, 3], greedy(50), request_id="mine")
            valve.await_arrival(1)
            assert future.cancel()
            assert wait([future], SECONDS).done == {future}
            await_state(
                llm.engine, lambda llm=llm: llm.engine.state.core.num_waiting + len(llm.engine.state.core.table) == 0
            )
            assert llm.engine.kv.usage == 0.0
            valve.open()


def test_an_answer_that_cannot_be_made_fails_its_own_future_only() -> None:
    with toy_llm() as llm:
        sink = llm.engine.delivery().sink()
        collector = llm._collector([1, 2, 3], greedy(30), sink, False, {})
        broken = sink.collect_with(collector)
        collector.take = lambda delta: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        llm._submit([collector])
        with pytest.raises(ZeroDivisionError):
            broken.result(SECONDS)
        assert tokens_of(llm.submit([3, 4], greedy(4)).result(SECONDS)) == expected_tokens([3, 4], 4)
        await_state(llm.engine, lambda: llm.engine.state.core.is_idle)


# -- streams


def test_cancel_from_another_thread_ends_the_iteration() -> None:
    for _ in range(REPEATS):
        with toy_llm() as llm, llm.stream([1, 2, 3], greedy(400)) as stream:
            first = next(stream)
            assert tokens_of(first) == expected_tokens([1, 2, 3], 1)
            threading.Thread(target=stream.cancel).start()
            last = first
            for part in stream:
                last = part
            assert last.outputs[0].finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)
            assert stream.finished


def test_a_dropped_stream_frees_its_blocks_within_a_step() -> None:
    for _ in range(REPEATS):
        valve = Valve()
        with toy_llm(on_forward=valve) as llm:
            stream = llm.stream(list(range(20)), greedy(300))
            valve.let_through()
            next(stream)
            valve.await_arrival(2)
            assert llm.engine.kv.usage > 0
            del stream
            await_state(llm.engine, lambda llm=llm: llm.engine.kv.usage == 0.0)
            valve.open()


def test_leaving_the_with_block_cancels() -> None:
    with toy_llm() as llm:
        with llm.stream([1, 2], greedy(400)) as stream:
            next(stream)
        await_state(llm.engine, lambda: llm.engine.state.core.is_idle)


def test_a_stream_may_be_looked_at_with_a_time_out() -> None:
    valve = Valve()
    with toy_llm(on_forward=valve) as llm:
        stream = llm.stream([1, 2], greedy(2))
        assert stream.next_delta(0.01) is None
        assert not stream.finished
        valve.open()
        parts = []
        while not stream.finished or len(parts) < 2:
            part = stream.next_delta(SECONDS)
            assert part is not None
            parts += tokens_of(part)
        with pytest.raises(StopIteration):
            stream.next_delta(SECONDS)
        assert parts == expected_tokens([1, 2], 2) == tokens_of(stream.result())


# -- the end, and the death of each thread


def ask_in_every_way(llm: Any) -> list[Future[Any]]:
    """A request through each of the library's doors; what they raise ends up in the futures."""
    outcomes: list[Future[Any]] = []

    def ask(way: Any) -> None:
        outcome: Future[Any] = Future()
        outcomes.append(outcome)

        def run() -> None:
            try:
                outcome.set_result(way())
            except BaseException as error:  # noqa: BLE001 - told by the future
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    ask(lambda: llm.generate([[1, 2], [3, 4]], greedy(100), use_tqdm=False))
    ask(lambda: list(llm.stream([5, 6], greedy(100))))
    outcomes.append(llm.submit([7, 8], greedy(100)))
    await_state(llm.engine, lambda: len(llm.engine.state._unanswered) == 4)
    return outcomes


def all_dead(outcomes: list[Future[Any]], message: str) -> list[BaseException]:
    errors = []
    for outcome in outcomes:
        error = outcome.exception(SECONDS)
        assert isinstance(error, EngineDeadError), error
        assert message in str(error)
        errors.append(error)
    assert len(set(map(id, errors))) == len(errors), "each is given an error of its own"
    return errors


def test_closing_tells_everybody_who_still_waits() -> None:
    for _ in range(REPEATS):
        valve = Valve()
        llm = toy_llm(on_forward=valve)
        outcomes = ask_in_every_way(llm)
        valve.await_arrival(1)
        closer = threading.Thread(target=llm.close)
        closer.start()
        all_dead(outcomes, "the engine was closed before the request finished")
        valve.open()
        closer.join(SECONDS)
        assert not closer.is_alive()
        for way in (lambda llm=llm: llm.generate([[1]], use_tqdm=False), lambda llm=llm: llm.submit([1]),
                    lambda llm=llm: llm.stream([1])):  # fmt: skip
            with pytest.raises(EngineDeadError, match="closed"):
                way()
        llm.close()
        assert not llm.is_ready
        assert llm.dead_cause is None


class Mortal(Scheduler):
    """The default until it is told to die."""

    dying = False

    def __init__(self, limits: Limits) -> None:
        super().__init__(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)

    def schedule(self, *books: Any) -> Any:
        if Mortal.dying:
            raise ZeroDivisionError("the scheduler died")
        return super().schedule(*books)


def test_the_death_of_the_scheduling_thread_is_told_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(REPEATS):
        valve = Valve()
        with toy_llm(on_forward=valve, scheduler="tests.engine.test_threads:Mortal") as llm:
            outcomes = ask_in_every_way(llm)
            monkeypatch.setattr(Mortal, "dying", True)
            valve.let_through()
            errors = all_dead(outcomes, "scheduler tests.engine.test_threads:Mortal raised ZeroDivisionError")
            assert all(isinstance(error.__cause__, SchedulerError) for error in errors)
            assert isinstance(llm.dead_cause, EngineDeadError)
            with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
                llm.submit([1])
            monkeypatch.setattr(Mortal, "dying", False)
            valve.open()


def test_its_death_is_told_at_once_even_where_nothing_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(REPEATS):
        with toy_llm(scheduler="tests.engine.test_threads:Mortal") as llm:
            llm.submit([1, 2], greedy(1)).result(SECONDS)
            state, thread = llm.engine.state, llm.engine._scheduling
            await_state(llm.engine, lambda state=state, thread=thread: thread._seen == state.version)
            monkeypatch.setattr(Mortal, "dying", True)
            error = llm.submit([1, 2], greedy(1)).exception(COLLECT_TIMEOUT / 2)
            assert isinstance(error, EngineDeadError)
            monkeypatch.setattr(Mortal, "dying", False)


@pytest.mark.parametrize("where", ["retire", "stats", "deliver"])
def test_the_death_of_the_output_thread_is_told_to_everybody(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("the output thread died")

    for _ in range(REPEATS):
        valve = Valve()
        with toy_llm(on_forward=valve) as llm:
            outcomes = ask_in_every_way(llm)
            if where == "retire":
                monkeypatch.setattr(llm.engine.state.core, "retire", fail)
            elif where == "stats":
                monkeypatch.setattr("llm_engine.engine.threads.output_thread.stats_of", fail)
            else:
                monkeypatch.setattr("llm_engine.engine.threads.output_thread.deltas_of", fail)
            valve.open()
            errors = all_dead(outcomes, "ZeroDivisionError('the output thread died')")
            assert all(isinstance(error.__cause__, ZeroDivisionError) for error in errors)
        monkeypatch.undo()


@pytest.mark.parametrize("stages", [1, 2])
def test_the_death_of_a_stage_is_told_to_everybody(stages: int) -> None:
    for _ in range(REPEATS):
        valve = Valve()
        with toy_llm(stages=stages, on_forward=valve) as llm:
            outcomes = ask_in_every_way(llm)
            valve.kill()
            all_dead(outcomes, "stage 0 died: tests.engine.engines.StageDeath: the stage was killed")


def test_raising_the_cause_of_death_over_and_over_keeps_no_tracebacks() -> None:
    valve = Valve()
    with toy_llm(on_forward=valve) as llm:
        future = llm.submit([1], greedy(1))
        valve.kill()
        assert isinstance(future.exception(SECONDS), EngineDeadError)
        for _ in range(3):
            with pytest.raises(EngineDeadError):
                llm.submit([1])
        assert llm.dead_cause is not None
        assert llm.dead_cause.__traceback__ is None


def test_a_start_that_fails_raises_and_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="num_kv_blocks"):
        toy_llm(num_kv_blocks=1)

    def no_engine(stage: int) -> Any:
        raise MemoryError("no room for the toy")

    from llm_engine import LLM

    for _ in range(REPEATS):
        with pytest.raises(MemoryError, match="no room"):
            LLM(model_engine=no_engine, num_kv_blocks=10)


def test_a_forgotten_engine_ends_its_threads() -> None:
    for _ in range(3):
        llm = toy_llm(stages=2)
        llm.submit([1, 2], greedy(3)).result(SECONDS)  # starts the delivery thread too
        engine, name = weakref.ref(llm.engine), llm.engine.name
        del llm
        gc.collect()
        assert engine() is None
        await_true(lambda name=name: not [t for t in threading.enumerate() if t.name.startswith(name + "-")])


def test_a_forgotten_engine_leaves_a_shared_registry() -> None:
    registry = CollectorRegistry()
    toy_llm(registry=registry, engine_label="gone")
    gc.collect()
    labels = {"model_name": "custom", "engine": "gone"}
    await_true(lambda: registry.get_sample_value("llm_engine_num_requests_running", labels) is None)
    toy_llm(registry=registry, engine_label="gone").close()


# -- an engine that has nothing to do


def cpu_share(seconds: float) -> float:
    """Share of a core this process uses."""
    cpu, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    return (time.process_time() - cpu) / (time.monotonic() - began)


@pytest.fixture(params=["empty", "one that cannot be admitted"])
def idle_engine(request: pytest.FixtureRequest) -> Any:
    """An engine with nothing to do; in one case somebody waits for the memory of one who is held in a step."""
    valve = Valve()
    with toy_llm(stages=2, on_forward=valve, num_kv_blocks=12) as llm:
        if request.param == "empty":
            valve.open()
            llm.submit([1, 2], greedy(3)).result(SECONDS)
        else:
            llm.submit(list(range(40)), greedy(3))
            valve.await_arrival(1)
            llm.submit(list(range(40, 80)), greedy(3))
            await_state(llm.engine, lambda: llm.engine.state.core.num_waiting == 1)
        time.sleep(0.05)
        yield llm
        valve.open()


def test_an_idle_engine_uses_no_cpu(idle_engine: Any) -> None:
    assert cpu_share(1.5) < 0.005


@pytest.mark.slow
def test_an_idle_engine_uses_no_cpu_for_ten_seconds(idle_engine: Any) -> None:
    assert cpu_share(10) < 0.005


def test_everything_works_where_no_event_loop_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an event loop was asked for")

    for name in ("new_event_loop", "run", "get_event_loop", "get_running_loop"):
        monkeypatch.setattr(asyncio, name, refuse)
    with toy_llm(stages=2) as llm:
        assert tokens_of(llm.generate([[1, 2]], greedy(3), use_tqdm=False)[0]) == expected_tokens([1, 2], 3)
        assert len(list(llm.stream([1, 2], greedy(3)))) == 3
        assert tokens_of(llm.submit([1, 2], greedy(3)).result(SECONDS)) == expected_tokens([1, 2], 3)
