"""How long a step may take: ten times what it is expected to take, half a minute at least."""

from __future__ import annotations

import pytest

from llm_engine.core.pipeline_timing import PipelineTiming
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.engine.threads.output_thread import COLLECT_TIMEOUT
from llm_engine.engine.threads.patience import LEAST_SECONDS, UNKNOWN_SECONDS, step_patience
from tests.engine.engines import greedy, toy_llm
from tests.engine.mortal import mortal
from tests.engine.test_faults import Loops
from tests.toy_model_engine import expected_tokens


def prompt_step(num_tokens: int, start: int = 0) -> StepPlan:
    return StepPlan(queue=0, chunk_ids=[1], chunk_tokens=[num_tokens], chunk_starts=[start], chunk_samples=[False])


def decode_step(num_rows: int, position: int = 100) -> StepPlan:
    ids = list(range(num_rows))
    return StepPlan(queue=0, decode_ids=ids, decode_positions=[position] * num_rows)


def seen(timing: PipelineTiming, plan: StepPlan, *seconds: float, error: str | None = None) -> None:
    timing.observe(plan, StepResult(0, 0, [], busy=[(0.0, each) for each in seconds], error=error))


def test_before_anything_is_known_there_is_a_limit_of_its_own() -> None:
    timing = PipelineTiming(1)
    assert step_patience(timing, [prompt_step(512)]) == UNKNOWN_SECONDS
    seen(timing, prompt_step(512), 1.0, error="no memory")
    assert step_patience(timing, [prompt_step(512)]) == UNKNOWN_SECONDS, "a failed step teaches nothing"


@pytest.mark.parametrize(("num_tokens", "seconds"), [(1, 0.05), (8, 0.15), (8, 0.001)])
def test_a_few_short_steps_do_not_make_it_patient(num_tokens: int, seconds: float) -> None:
    timing = PipelineTiming(1)
    seen(timing, decode_step(num_tokens), seconds)
    assert step_patience(timing, [prompt_step(512)]) == LEAST_SECONDS
    assert step_patience(timing, []) == LEAST_SECONDS


def test_it_is_ten_times_the_longest_step_in_flight_over_all_stages() -> None:
    timing = PipelineTiming(2)
    for num_tokens in (8, 150, 300, 600):
        for _ in range(3):
            seen(timing, prompt_step(num_tokens), num_tokens / 150, num_tokens / 200)
    assert step_patience(timing, [decode_step(4)]) == LEAST_SECONDS
    assert step_patience(timing, [decode_step(4), prompt_step(600), prompt_step(150)]) == pytest.approx(70, rel=0.1)
    assert step_patience(timing, [prompt_step(1200)]) == pytest.approx(140, rel=0.1)


def test_a_long_history_is_reckoned_with() -> None:
    timing = PipelineTiming(1)
    for start in (0, 10_000, 20_000, 40_000) * 3:
        seen(timing, prompt_step(512, start), 1.0 + start / 10_000)
    assert step_patience(timing, [prompt_step(512)]) == LEAST_SECONDS
    assert step_patience(timing, [prompt_step(512, 80_000)]) == pytest.approx(90, rel=0.15)


def test_one_stall_is_forgotten() -> None:
    timing = PipelineTiming(1)
    for _ in range(10):
        seen(timing, decode_step(8), 0.1)
    seen(timing, decode_step(8), 25.0)
    for _ in range(100):
        seen(timing, decode_step(8), 0.1)
    assert step_patience(timing, [decode_step(8), prompt_step(512)]) == LEAST_SECONDS


def test_the_executor_is_told_how_patient_to_be() -> None:
    with toy_llm(executor="tests.engine.mortal:MortalExecutor") as llm:
        executor = mortal(llm.engine)
        assert executor.step_patience == UNKNOWN_SECONDS
        llm.generate(list(range(40)), greedy(2), use_tqdm=False)
        assert executor.step_patience == LEAST_SECONDS


def test_while_nothing_comes_back_it_goes_by_the_steps_in_flight() -> None:
    loops = Loops()
    timing, executor = loops.state.core.table.timing, loops.executor
    for _ in range(3):
        seen(timing, prompt_step(3), 4.0)
    assert executor.step_patience == LEAST_SECONDS
    loops.plan()
    assert loops.collect(None)
    assert executor.step_patience == pytest.approx(40, rel=0.05)
    assert loops.run() == expected_tokens([5, 6, 7], 6)


def test_while_results_come_it_is_looked_at_now_and_then() -> None:
    loops = Loops()
    for _ in range(4):
        loops.executor.step_patience = UNKNOWN_SECONDS
        loops.plan()
        for _ in range(int(COLLECT_TIMEOUT)):
            next(loops.time)
        assert loops.output.collect_once(loops.state, 0.0)
        assert loops.executor.step_patience == LEAST_SECONDS
