"""With real threads: stages that die and come back, seen from the callers, from /ready's side and from the numbers.

The stages are threads (``MortalExecutor``); processes are killed in ``test_faults_zmq.py``.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import wait

import pytest
from prometheus_client import CollectorRegistry

from llm_engine import CompletionOutput, EngineDeadError, FinishReason, RequestFailedError, RequestShedError
from llm_engine.core.errors import QueueFullError
from llm_engine.core.request import Request, RequestId
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.engine.executors.base import Collected, StageDied, StagesUp
from llm_engine.engine.stream import QueueSink
from llm_engine.engine.threads.output_thread import OutputThread
from llm_engine.engine.threads.recovery import RESTART_WINDOW, RestartBudget
from llm_engine.engine.threads.scheduling_thread import SchedulingThread
from llm_engine.metrics.engine_metrics import EngineMetrics
from tests.engine.engines import SECONDS, Valve, await_state, await_true, greedy, tokens_of, toy_llm
from tests.engine.mortal import await_epoch, mortal
from tests.engine.test_loops import InlineExecutor, make_state
from tests.toy_model_engine import expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")

MORTAL = "tests.engine.mortal:MortalExecutor"
PROMPTS = ([1, 2, 3], [4, 5, 6, 7], [8] * 9)


class Scene:
    """Three requests on a valve, ``forwards`` of which are through; the next one is held there."""

    def __init__(self, forwards: int, *, stages: int = 2, **settings: object) -> None:
        self.valve = Valve()
        self.llm = toy_llm(stages=stages, on_forward=self.valve, executor=MORTAL, **settings)
        self.engine, self.executor = self.llm.engine, mortal(self.llm.engine)
        self.futures = [self.llm.submit(prompt, greedy(8)) for prompt in PROMPTS]
        for number in range(forwards):
            self.valve.await_arrival(number + 1)
            self.valve.let_through()
        self.valve.await_arrival(forwards + 1)

    def die(self) -> None:
        """The first stage dies in its forward; no other comes before ``come_back``."""
        epoch = self.engine.state.core.epoch
        self.executor.hold()
        self.valve.kill()
        await_epoch(self.engine, epoch + 1, up=False)

    def come_back(self) -> None:
        self.valve.heal()
        self.valve.open()
        self.executor.release()
        await_state(self.engine, lambda: self.engine.state.core.stages_up)

    def check_answers(self) -> None:
        assert not wait(self.futures, SECONDS).not_done, "nobody was told"
        for future, prompt in zip(self.futures, PROMPTS, strict=True):
            assert tokens_of(future.result()) == expected_tokens(prompt, 8)

    def check_idle(self) -> None:
        await_state(self.engine, lambda: self.engine.state.core.is_idle)
        assert self.engine.kv.usage == 0.0
        self.engine.state.core.check_integrity()

    def metric(self, name: str) -> float | None:
        return self.llm.registry.get_sample_value(f"llm_engine_{name}", {"model_name": "custom", "engine": "0"})


# -- replay


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("forwards", [0, 1, 2, 5])
def test_every_request_goes_on_to_the_right_tokens(forwards: int, stages: int) -> None:
    scene = Scene(forwards, stages=stages)
    with scene.llm:
        scene.die()
        scene.come_back()
        scene.check_answers()
        scene.check_idle()
        assert all(step.epoch in (0, 1) for step in scene.llm.get_stats())


def test_while_the_stages_are_away_the_engine_says_so_and_is_alive(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llm_engine")
    scene = Scene(2)
    with scene.llm as llm:
        assert (llm.is_ready, llm.unready_reason, scene.metric("stages_up")) == (True, None, 2)
        scene.die()
        assert not llm.is_ready
        assert llm.unready_reason is not None
        assert llm.unready_reason.startswith("stage 0 died: tests.engine.engines.StageDeath: the stage was killed; ")
        assert "\n" not in llm.unready_reason
        assert llm.dead_cause is None
        assert (scene.metric("stages_up"), scene.metric("num_requests_running")) == (0, 0)
        scene.come_back()
        assert (llm.is_ready, llm.unready_reason, scene.metric("stages_up")) == (True, None, 2)
        scene.check_answers()
        assert (scene.metric("stage_restarts_total"), scene.metric("preemptions_total")) == (1, 0)
        assert scene.metric("replays_total") == 3
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "recovery" in record.name]
    assert [level for level, _ in said] == ["WARNING", "INFO"]
    assert "the stage was killed" in said[0][1]
    assert "back after" in said[1][1]


def test_a_deadline_that_passes_while_the_stages_are_away_is_told_at_once() -> None:
    scene = Scene(2, scheduler="deadline")
    with scene.llm as llm:
        scene.die()
        future = llm.submit([1, 2, 3], greedy(4), deadline_ms=50)
        error = future.exception(SECONDS)
        assert isinstance(error, RequestShedError)
        assert "deadline_ms 50 passed while it waited" in str(error)
        assert not llm.is_ready, "the stages are still away"
        scene.come_back()
        scene.check_answers()
        scene.check_idle()


def test_a_stream_sees_a_pause_and_nothing_else() -> None:
    scene = Scene(0)
    with scene.llm as llm:
        with llm.stream([9, 9], greedy(8)) as stream:
            parts: list[list[int]] = []
            reader = threading.Thread(target=lambda: parts.extend(part.outputs[0].token_ids for part in stream))
            reader.start()
            for number in range(6):
                scene.valve.let_through()
                scene.valve.await_arrival(number + 2)
            scene.die()
            assert scene.engine.state.core.num_replays > 0
            scene.come_back()
            reader.join(SECONDS)
        assert [token for part in parts for token in part] == expected_tokens([9, 9], 8)
        scene.check_answers()


def test_stages_that_die_with_nothing_to_do_come_back() -> None:
    with toy_llm(stages=2, executor=MORTAL) as llm:
        assert tokens_of(llm.generate([1, 2, 3], greedy(4), use_tqdm=False)[0]) == expected_tokens([1, 2, 3], 4)
        mortal(llm.engine).kill()
        await_epoch(llm.engine, 1)
        assert llm.is_ready
        assert tokens_of(llm.generate([1, 2, 3], greedy(4), use_tqdm=False)[0]) == expected_tokens([1, 2, 3], 4)
        assert llm.engine.state.core.num_replays == 0


def test_nothing_cached_before_the_death_is_found_after_it() -> None:
    prompt = list(range(20))
    with toy_llm(executor=MORTAL) as llm:
        llm.generate(prompt, greedy(2), use_tqdm=False)
        assert llm.generate(prompt, greedy(2), use_tqdm=False)[0].num_cached_tokens == 16
        mortal(llm.engine).kill()
        await_epoch(llm.engine, 1)
        after = llm.generate(prompt, greedy(2), use_tqdm=False)[0]
        assert (after.num_cached_tokens, tokens_of(after)) == (0, expected_tokens(prompt, 2))


def test_many_lives_under_load() -> None:
    """Deaths at no chosen moment: no valve, four callers, a kill whenever some more answers are there."""
    with toy_llm(stages=2, executor=MORTAL, max_stage_restarts=1000) as llm:
        answers: list[tuple[list[int], CompletionOutput]] = []

        def call(seed: int) -> None:
            for number in range(20):
                prompt = [seed, number, *range(seed + number)]
                answers.append((prompt, llm.generate(prompt, greedy(20), use_tqdm=False)[0].outputs[0]))

        callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
        for caller in callers:
            caller.start()
        for epoch in range(1, 12):
            answered = len(answers)
            await_true(lambda answered=answered: len(answers) > min(answered + 5, 79))
            mortal(llm.engine).kill(f"kill {epoch}")
            await_epoch(llm.engine, epoch)
        for caller in callers:
            caller.join(SECONDS)
        assert len(answers) == 80
        for prompt, output in answers:
            if output.finish_reason is FinishReason.ERROR:  # in flight at two deaths: the only reason to fail
                assert output.error is not None
                assert "; stage 0 died: kill " in output.error
            else:
                assert output.token_ids == expected_tokens(prompt, 20)
        assert sum(output.finish_reason is FinishReason.LENGTH for _, output in answers) > 40
        await_state(llm.engine, lambda: llm.engine.state.core.is_idle)
        assert llm.engine.kv.usage == 0.0


# -- callers meanwhile


def test_arrivals_wait_and_aborts_are_answered_while_the_stages_are_away() -> None:
    scene = Scene(2, max_num_waiting=5)
    with scene.llm as llm:
        scene.die()
        late = llm.submit([7, 7], greedy(4))
        with pytest.raises(QueueFullError, match="max_num_waiting is 5"):
            llm.submit([1], greedy(1, n=2))
        with llm.stream([6, 6], greedy(4)) as stream:
            pass
        assert [part.outputs[0].finish_reason for part in stream] == [FinishReason.ABORT], "answered at once"
        scene.futures[0].cancel()
        await_state(scene.engine, lambda: len(scene.engine.state.core.table) == 3)
        scene.come_back()
        assert tokens_of(late.result(SECONDS)) == expected_tokens([7, 7], 4)
        for future, prompt in list(zip(scene.futures, PROMPTS, strict=True))[1:]:
            assert tokens_of(future.result(SECONDS)) == expected_tokens(prompt, 8)
        scene.check_idle()


def test_closing_while_the_stages_are_away_tells_everybody_at_once() -> None:
    scene = Scene(2)
    scene.die()
    began = time.monotonic()
    scene.llm.close()
    assert time.monotonic() - began < 5
    for future in scene.futures:
        with pytest.raises(EngineDeadError, match="closed"):
            future.result(0)
    assert scene.llm.unready_reason == "the engine is closed"


def test_without_replay_whoever_runs_fails_with_the_cause_and_whoever_waits_goes_on() -> None:
    scene = Scene(2, max_num_seqs=2, on_stage_death="fail")
    with scene.llm:
        scene.die()
        for future in scene.futures[:2]:
            with pytest.raises(RequestFailedError, match=r"the stages were lost: stage 0 died: .*the stage was killed"):
                future.result(SECONDS)
        assert not scene.futures[2].done()
        scene.come_back()
        assert tokens_of(scene.futures[2].result(SECONDS)) == expected_tokens(PROMPTS[2], 8)
        assert scene.metric("replays_total") == 0
        scene.check_idle()


def test_a_request_that_kills_twice_is_told_so_and_the_others_live() -> None:
    """The one that is in flight each time fails; the one that waited behind it does not."""
    scene = Scene(0, max_num_seqs=1)
    with scene.llm:
        for _ in range(2):
            scene.die()
            scene.valve.heal()
            arrived = scene.valve.arrived
            scene.executor.release()
            scene.valve.await_arrival(arrived + 1)  # whoever is first in the queue
        with pytest.raises(RequestFailedError, match=r"twice: stage 0 died: .*; stage 0 died: "):
            scene.futures[0].result(SECONDS)
        scene.valve.open()
        for future, prompt in list(zip(scene.futures, PROMPTS, strict=True))[1:]:
            assert tokens_of(future.result(SECONDS)) == expected_tokens(prompt, 8)
        assert scene.llm.is_ready


# -- when it is over


def check_dead(scene: Scene, saying: str) -> None:
    assert not wait(scene.futures, SECONDS).not_done, "nobody was told"
    for future in scene.futures:
        error = future.exception()
        assert isinstance(error, EngineDeadError)
        assert saying in str(error)
    dead = scene.llm.dead_cause
    assert dead is not None
    assert saying in str(dead)
    assert scene.llm.unready_reason == str(dead).partition("\n")[0]
    assert scene.metric("stages_up") == 0


def test_a_death_beyond_the_budget_ends_the_engine() -> None:
    scene = Scene(2, max_stage_restarts=1)
    with scene.llm:
        scene.die()
        scene.executor.kill("and once more")
        check_dead(
            scene, "stage 0 died: and once more; the stages are not started again: max_stage_restarts is 1 in 300 s"
        )
        assert scene.executor.restarts == [1]


def test_stages_that_do_not_start_again_spend_the_budget() -> None:
    scene = Scene(2)
    with scene.llm:
        scene.executor.start_errors = ["no memory is left"] * 3
        scene.valve.kill()
        check_dead(scene, "stage 0 died: no memory is left; the stages are not started again: max_stage_restarts is 3")
        assert scene.executor.restarts == [1, 2, 3]


def test_stages_that_start_at_the_second_attempt_are_back() -> None:
    scene = Scene(2)
    with scene.llm:
        scene.executor.start_errors = ["no memory is left"]
        scene.die()
        scene.come_back()
        scene.check_answers()
        assert scene.executor.restarts == [1, 2]
        assert scene.metric("replays_total") == 3


@pytest.mark.parametrize("settings", [{"max_stage_restarts": 0}, {}])
def test_stages_that_may_not_be_started_again_end_the_engine(settings: dict[str, int]) -> None:
    scene = Scene(2, **settings)
    with scene.llm:
        scene.executor.restartable = bool(settings)
        scene.valve.kill()
        check_dead(scene, "stage 0 died: tests.engine.engines.StageDeath: the stage was killed")
        assert scene.executor.restarts == []


def test_an_executor_that_cannot_begin_a_restart_ends_the_engine() -> None:
    scene = Scene(2)
    with scene.llm:
        scene.executor.restart_error = OSError("no process left")
        scene.valve.kill()
        check_dead(scene, "the stages could not be started again: OSError('no process left')")


def test_the_budget_slides() -> None:
    budget = RestartBudget(2)
    assert [budget.spend(now) for now in (0.0, 10.0, 20.0, RESTART_WINDOW - 1)] == [True, True, False, False]
    assert [budget.spend(RESTART_WINDOW + at) for at in (0.0, 1.0, 10.0, 11.0)] == [True, False, True, False]
    assert not RestartBudget(0).spend(0.0)


# -- the loops' bodies, without a thread


class Scripted(InlineExecutor):
    """Hands over what the test puts into ``events``."""

    def __init__(self) -> None:
        super().__init__()
        self.restarts: list[int] = []
        self.sent: deque[Collected] = deque()

    @property
    def can_restart(self) -> bool:
        return True

    def restart(self, epoch: int) -> None:
        self.restarts.append(epoch)

    def collect(self, timeout: float | None) -> Collected:
        return self.sent.popleft() if self.sent else super().collect(timeout)


class Loops:
    """The two loops over a scripted executor, on a clock of whole numbers."""

    def __init__(self, **recovery: int) -> None:
        self.time = itertools.count()
        self.executor, self.state, self.sink = Scripted(), make_state(self.time), QueueSink()
        self.executor.start()
        metrics = EngineMetrics(CollectorRegistry(), model_name="toy", version="0")
        self.scheduling = SchedulingThread(self.state, self.executor, "scheduling")
        self.output = OutputThread(
            self.executor, lambda info: self.state, metrics, deque(), "output", **{"max_restarts": 3, **recovery}
        )
        self.request = Request(RequestId(0), "r", [5, 6, 7], greedy(6), 9, arrival=0.0, sink=self.sink)
        self.state.submit([self.request])

    def collect(self, event: Collected) -> bool:
        self.executor.sent.append(event)
        return self.output.collect_once(self.state, 0.0)

    def plan(self) -> StepPlan:
        """Push one; its result stays unread."""
        assert self.scheduling.schedule_once(wait=False)
        return self.state.core.in_flight[-1].plan

    def run(self) -> list[int]:
        while not self.state.core.is_idle:
            self.scheduling.schedule_once(wait=False)
            assert self.output.collect_once(self.state, 0.0)
        deltas = iter(lambda: self.sink.take(0.0), [])
        return [token for batch in deltas for delta in batch for token in delta.token_ids]


def nonsense(plan: StepPlan) -> Iterator[StepResult]:
    right = {"epoch": plan.epoch, "step": plan.step, "tokens": [1]}
    yield StepResult(**{**right, "step": plan.step + 1})  # type: ignore[arg-type]
    yield StepResult(**{**right, "step": 0})  # type: ignore[arg-type]
    yield StepResult(**{**right, "epoch": plan.epoch + 1})  # type: ignore[arg-type]
    yield StepResult(**{**right, "tokens": []})  # type: ignore[arg-type]
    yield StepResult(**{**right, "tokens": [1, 2]})  # type: ignore[arg-type]
    yield StepResult(**right, prompt_logprobs={17: []})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", range(6))
def test_nonsense_in_an_answer_is_a_death(kind: int) -> None:
    loops = Loops()
    plan = loops.plan()
    assert loops.collect(list(nonsense(plan))[kind])
    assert (loops.state.core.epoch, loops.executor.restarts) == (1, [1])
    assert loops.state.outage is not None
    assert "stage 0 died: it answered" in loops.state.outage or "scored prompts" in loops.state.outage
    assert loops.collect(StagesUp(1))
    assert loops.run() == expected_tokens([5, 6, 7], 6)


def test_an_answer_of_the_dead_is_dropped() -> None:
    loops = Loops()
    loops.plan()
    assert loops.collect(StageDied(0, "killed"))
    assert loops.output.collect_once(loops.state, 0.0), "the result was under way when the stage died"
    assert loops.request.num_output_tokens == 0
    assert loops.collect(StagesUp(1))
    assert loops.run() == expected_tokens([5, 6, 7], 6)


def test_stages_of_a_restart_that_was_overtaken_do_not_count() -> None:
    loops = Loops()
    loops.collect(StageDied(0, "killed"))
    loops.collect(StageDied(0, "killed again"))
    assert loops.executor.restarts == [1, 2]
    assert loops.collect(StagesUp(1))
    assert not loops.state.core.stages_up
    assert loops.scheduling.schedule_once(wait=False)
    assert not loops.state.core.in_flight
    assert loops.collect(StagesUp(2))
    assert loops.run() == expected_tokens([5, 6, 7], 6)


def test_the_window_of_restarts_follows_the_given_clock() -> None:
    loops = Loops(max_restarts=1)
    assert loops.collect(StageDied(0, "killed"))
    assert loops.collect(StagesUp(1))
    for _ in range(int(RESTART_WINDOW)):
        next(loops.time)
    assert loops.collect(StageDied(0, "killed"))
    assert loops.collect(StagesUp(2))
    assert not loops.collect(StageDied(0, "killed")), "the engine is over"
    assert loops.state.dead is not None


def test_a_death_while_the_engine_ends_begins_nothing() -> None:
    loops = Loops()
    loops.state.stop()
    assert not loops.collect(StageDied(0, "killed"))
    assert (loops.executor.restarts, loops.state.core.epoch) == ([], 0)
