"""What every executor promises, over every executor that can run the toy model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import ModelLoadError
from llm_engine.core.step import StepResult
from llm_engine.engine.executors.base import Executor, StageDied, Wake
from llm_engine.engine.executors.inproc import InprocExecutor
from llm_engine.engine.executors.registry import ExecutorSpec, make_zmq
from tests.plans import Planner
from tests.toy_model_engine import Gate, ToyModelEngine, expected_tokens, fail_on
from tests.toy_stages import ProcessGate, make_stage, tell_stages

SECONDS = 10.0
"""Long enough for anything that comes at all."""


class Kind:
    """Makes executors of one kind and number of stages over toy engines, and hooks for them. ``hooks`` maps a stage
    (negative from the end) to its ``on_forward``."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.made: list[Any] = []

    def close(self) -> None:
        for thing in self.made:
            thing.shutdown() if isinstance(thing, Executor) else thing.close()


class Inproc(Kind):
    def __call__(
        self, hooks: dict[int, Any] | None = None, engine_class: type[ToyModelEngine] = ToyModelEngine
    ) -> Executor:
        by_stage = {stage % self.num_stages: hook for stage, hook in (hooks or {}).items()}
        executor = InprocExecutor(
            lambda stage: engine_class(stage, self.num_stages, on_forward=by_stage.get(stage)),
            num_stages=self.num_stages,
            max_num_seqs=8,
            block_size=4,
            num_kv_blocks=64,
        )
        self.made.append(executor)
        return executor

    def gate(self) -> Gate:
        return Gate()

    def failing(self, number: int) -> Any:
        return fail_on(number)


class Zmq(Kind):
    def __init__(self, num_stages: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(num_stages)
        self.monkeypatch, self.folder = monkeypatch, folder

    def __call__(
        self, hooks: dict[int, Any] | None = None, engine_class: type[ToyModelEngine] = ToyModelEngine
    ) -> Executor:
        tell_stages(self.monkeypatch, self.num_stages, hooks, engine_class)
        config = EngineConfig.of(pipeline_parallel_size=self.num_stages, max_num_seqs=8, num_kv_blocks=64)
        executor = make_zmq(ExecutorSpec(config, make_stage, block_size=4))
        self.made.append(executor)
        return executor

    def gate(self) -> ProcessGate:
        gate = ProcessGate(self.folder)
        self.made.append(gate)
        return gate

    def failing(self, number: int) -> Any:
        return ("failing", number)


MakeExecutor = Inproc | Zmq


@pytest.fixture(params=["inproc-1", "inproc-2", "inproc-3", "zmq-1", "zmq-2", "zmq-3"])
def make_executor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[MakeExecutor]:
    """What it makes is ended afterwards."""
    kind, _, num_stages = request.param.partition("-")
    maker = Inproc(int(num_stages)) if kind == "inproc" else Zmq(int(num_stages), monkeypatch, tmp_path)
    yield maker
    maker.close()


def result_of(executor: Executor) -> StepResult:
    collected = executor.collect(SECONDS)
    assert isinstance(collected, StepResult), collected
    return collected


def test_start_tells_model_and_pool(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    info = executor.start()
    assert info.num_stages == executor.num_stages
    assert (info.num_kv_blocks, info.block_size) == (64, 4)
    assert info.model.num_layers == 3 and info.model.kv_bytes_per_token == 24
    assert info.model.vocab_size == 97
    assert info.model.num_parameters == 75


def test_tokens_are_right_over_chunks_and_decodes(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    planner = Planner()
    a, b = planner.add([3, 1, 4, 1, 5, 9, 2, 6, 5]), planner.add([2, 7])
    for rows in ({1: 4}, {1: 3, 2: 2}, {2: 1, 1: 2}, *([{1: 1, 2: 1}] * 10)):
        plan = planner.plan(rows)
        executor.push(plan)
        planner.enter(plan, result_of(executor))
    assert a.outputs == expected_tokens([3, 1, 4, 1, 5, 9, 2, 6, 5], 11)
    assert b.outputs == expected_tokens([2, 7], 12)


def test_results_come_in_the_order_of_pushes_and_all_stages_tell_their_times(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    planner = Planner()
    for prompt in range(20):
        planner.add([prompt, prompt + 1], slot=prompt % 8)
    before = time.monotonic()
    plans = [planner.plan({request_id: 2}) for request_id in planner.requests]
    for plan in plans:
        executor.push(plan)
    for prompt, plan in enumerate(plans):
        result = result_of(executor)
        assert result.step == plan.step
        assert result.tokens == expected_tokens([prompt, prompt + 1], 1)
        assert len(result.busy) == executor.num_stages
        times = [moment for span in result.busy for moment in span]
        assert times == sorted(times) and before <= times[0] and times[-1] <= time.monotonic()


def test_slots_and_blocks_change_owner_when_a_plan_executes(make_executor: MakeExecutor) -> None:
    """Everything is pushed while the first step is held: reuse of slot and blocks must wait for its turn."""
    gate = make_executor.gate()
    executor = make_executor({0: gate})
    executor.start()
    planner = Planner(num_blocks=4)
    first = planner.add([1, 2, 3, 4, 5, 6, 7, 8], slot=0)
    plans = [planner.plan({1: 4}), planner.plan({1: 4})]
    planner.pause(first)
    second = planner.add([60, 61, 62, 63, 64], slot=0)
    plans.append(planner.plan({second.request_id: 5}))
    assert set(plans[2].starts[0].block_ids) <= {1, 2}
    for plan in plans:
        executor.push(plan)
    gate.open()
    assert [result_of(executor).tokens for _ in plans] == [
        [], expected_tokens([1, 2, 3, 4, 5, 6, 7, 8], 1), expected_tokens([60, 61, 62, 63, 64], 1)
    ]  # fmt: skip


def test_a_paused_request_resumes_whole_on_another_slot(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    planner = Planner()
    request = planner.add([5, 4, 3, 2, 1])
    for count in (5, 1, 1):
        plan = planner.plan({1: count})
        executor.push(plan)
        planner.enter(plan, result_of(executor))
    planner.pause(request)
    request.slot = 3
    for count in (6, 2, 1, 1):
        plan = planner.plan({1: count})
        executor.push(plan)
        planner.enter(plan, result_of(executor))
    assert request.outputs == expected_tokens([5, 4, 3, 2, 1], 6)


def test_collect_times_out(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    began = time.monotonic()
    assert executor.collect(0.05) is None
    assert 0.04 <= time.monotonic() - began < 5
    assert executor.collect(0) is None


def test_wakes_count_as_one_until_seen(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    for _ in range(3):
        executor.wake()
    assert executor.collect(SECONDS) == Wake()
    assert executor.collect(0) is None
    executor.wake()
    assert executor.collect(None) == Wake()


def test_wakes_from_many_threads_are_never_lost(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    calls = 200
    seen_by: list[int] = [0] * 4
    seen = [threading.Event() for _ in seen_by]

    def call(index: int) -> None:
        for number in range(calls):
            seen[index].clear()
            seen_by[index] = number + 1
            executor.wake()
            assert seen[index].wait(SECONDS)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(seen_by))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if isinstance(executor.collect(0.05), Wake):
            for event in seen:
                event.set()
    assert seen_by == [calls] * len(seen_by)


def test_wake_ends_a_collect_that_waits(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    timer = threading.Timer(0.05, executor.wake)
    timer.start()
    assert executor.collect(SECONDS) == Wake()
    timer.join()


@pytest.mark.parametrize("failing_stage", [0, -1])
def test_a_failed_step_answers_and_the_next_one_is_right(make_executor: MakeExecutor, failing_stage: int) -> None:
    executor = make_executor({failing_stage: make_executor.failing(1)})
    executor.start()
    planner = Planner()
    a = planner.add([10, 11, 12, 13, 14])
    b = planner.add([20, 21, 22])
    first, failing = planner.plan({1: 5}), planner.plan({2: 3})
    planner.pause(b)  # what the engine does with the requests of a failed step
    again = planner.plan({2: 3})
    for plan in (first, failing, again):
        executor.push(plan)
    planner.enter(first, result_of(executor))
    failed = result_of(executor)
    assert failed.step == failing.step and failed.tokens == []
    assert failed.error is not None and "the toy was told to fail" in failed.error
    assert len(failed.busy) == executor.num_stages
    planner.enter(again, result_of(executor))
    plan = planner.plan({1: 1, 2: 1})
    executor.push(plan)
    planner.enter(plan, result_of(executor))
    assert a.outputs == expected_tokens([10, 11, 12, 13, 14], 2)
    assert b.outputs == expected_tokens([20, 21, 22], 2)


def test_plans_go_on_from_tokens_that_nobody_outside_has_seen(make_executor: MakeExecutor) -> None:
    """All is pushed while the first step is held: two cohorts in turn, a newcomer among them, each plan fed by the last
    one of its cohort."""
    gate = make_executor.gate()
    executor = make_executor({0: gate})
    assert executor.start().feeds_back
    planner = Planner()
    prompts = [[3, 1, 4, 1, 5], [2, 7], [1, 8, 2]]
    requests = [planner.add(prompt) for prompt in prompts]
    plans = [planner.plan({1: 5}), planner.plan({2: 2})]
    for turn in range(6):
        plans.append(planner.plan({1: 1, 3: 3} if turn == 0 else {1: 1, 3: 1}, feeds_from=plans[-2].step))
        plans.append(planner.plan({2: 1}, feeds_from=plans[-2].step))
    for plan in plans:
        executor.push(plan)
    gate.open()
    for plan in plans:
        planner.enter(plan, result_of(executor))
    for prompt, request, count in zip(prompts, requests, (7, 7, 6), strict=True):
        assert request.outputs == expected_tokens(prompt, count)


@pytest.mark.parametrize("failing_stage", [0, -1])
def test_what_was_pushed_behind_a_failed_step_is_answered(make_executor: MakeExecutor, failing_stage: int) -> None:
    """The step ahead has no tokens to go on from: it computes nonsense for these rows, and the others' are right."""
    executor = make_executor({failing_stage: make_executor.failing(2)})
    executor.start()
    planner = Planner()
    planner.add([10, 11, 12, 13, 14])
    spared = planner.add([20, 21, 22])
    plans = [planner.plan({1: 5}), planner.plan({2: 3})]
    failing, between = planner.plan({1: 1}, feeds_from=0), planner.plan({2: 1}, feeds_from=1)
    ahead = planner.plan({1: 1, 2: 1}, feeds_from=between.step)
    for plan in (*plans, failing, between, ahead):
        executor.push(plan)
    for plan in plans:
        planner.enter(plan, result_of(executor))
    failed = result_of(executor)
    assert (failed.step, failed.tokens) == (failing.step, []) and failed.error is not None
    planner.enter(between, result_of(executor))
    last = result_of(executor)
    assert last.error is None
    assert [*spared.outputs, last.tokens[1]] == expected_tokens([20, 21, 22], 3)


def test_books_take_the_changes_of_a_failed_step(make_executor: MakeExecutor) -> None:
    """The start was in the failed step; the next one only brings a chunk of it."""
    executor = make_executor({0: make_executor.failing(0)})
    executor.start()
    planner = Planner()
    request = planner.add([30, 31, 32, 33, 34, 35])
    executor.push(planner.plan({1: 6}))
    assert result_of(executor).error is not None
    request.num_computed = 0
    plan = planner.plan({1: 6})
    assert not plan.starts
    executor.push(plan)
    planner.enter(plan, result_of(executor))
    assert request.outputs == expected_tokens([30, 31, 32, 33, 34, 35], 1)


class Unloadable(ToyModelEngine):
    def load(self, progress: object = None) -> object:  # type: ignore[override]
        if self.stage == self.num_stages - 1:
            raise ModelLoadError("no such weight: toy.layers.7")
        return super().load(None)


class Unallocatable(ToyModelEngine):
    def allocate(self, num_blocks: int, block_size: int) -> None:
        if self.stage == self.num_stages - 1:
            raise MemoryError("no room for the toy's pool")
        super().allocate(num_blocks, block_size)


@pytest.mark.parametrize(("engine_class", "error"), [(Unloadable, ModelLoadError), (Unallocatable, MemoryError)])
def test_start_raises_what_a_stage_raised(
    make_executor: MakeExecutor, engine_class: type[ToyModelEngine], error: type[Exception]
) -> None:
    before = threading.active_count()
    executor = make_executor(engine_class=engine_class)
    with pytest.raises(error, match="toy"):
        executor.start()
    assert threading.active_count() == before
    executor.shutdown()


def test_the_death_of_a_stage_is_reported_and_pushing_goes_on(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.start()
    planner = Planner()
    planner.add([1, 2])
    plan = planner.plan({1: 2})
    plan.grown_slots, plan.grown_blocks = [0] * 1000, [1] * 1000  # contradicts the books: no stage survives that
    executor.push(plan)
    death = executor.collect(SECONDS)
    assert isinstance(death, StageDied) and death.stage == 0 and "block table" in death.cause
    executor.push(planner.plan({}))
    assert executor.collect(0.02) is None
    executor.wake()
    assert executor.collect(SECONDS) == Wake()


def test_shutdown_before_start_and_twice(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    executor.shutdown()
    executor.shutdown()


def test_shutdown_with_work_in_flight_drops_it(make_executor: MakeExecutor) -> None:
    gate = make_executor.gate()
    before = threading.active_count()
    executor = make_executor({-1: gate})
    executor.start()
    planner = Planner()
    planner.add([1, 2, 3, 4])
    for _ in range(4):
        executor.push(planner.plan({1: 1}))
    assert gate.waiting.acquire(timeout=SECONDS)
    threading.Timer(0.05, gate.open).start()
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < 5
    executor.shutdown()
    while threading.active_count() > before:  # the timer's
        time.sleep(0.001)
    while (collected := executor.collect(0)) is not None:
        assert collected == Wake() or (isinstance(collected, StepResult) and collected.step == 0)
