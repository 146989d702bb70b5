"""A stage over the toy model: right tokens, and the same after every kind of trouble."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llm_engine.core.errors import EngineDeadError, ModelLoadError
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.workers.model_engine import ModelEngine
from llm_engine.workers.sampler import BatchSampler, SamplerFactory
from llm_engine.workers.slots import SlotTable
from llm_engine.workers.stage import METHODS, Stage, StageOutput
from tests.plans import Planner
from tests.toy_model_engine import (
    VOCAB_SIZE,
    BreakableToy,
    ToyModelEngine,
    expected_logits,
    expected_tokens,
    fail_on,
)
from tests.workers.plain_sampler import draw, log_softmax, uniform


def make_stage(
    model_engine: ModelEngine,
    index: int = 0,
    num_stages: int = 1,
    make_sampler: SamplerFactory = BatchSampler,
    feeds_back: bool = False,
) -> Stage:
    """A loaded stage whose clock counts its readings."""
    readings: Iterator[int] = count()

    def clock() -> float:
        return float(next(readings))

    stage = Stage(
        model_engine,
        make_sampler,
        index=index,
        num_stages=num_stages,
        max_num_seqs=8,
        feeds_back=feeds_back,
        clock=clock,
    )
    stage.load()
    stage.allocate(64, 4)
    return stage


def run(stages: list[Stage], plan: StepPlan) -> StepResult:
    received: StageOutput | None = None
    for stage in stages:
        output = stage.execute(plan, received)
        if isinstance(output, StepResult):
            return output
        received = output
    raise AssertionError("the last stage gave no result")


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_sampled_requests_get_the_same_tokens_whatever_runs_beside_them(num_stages: int) -> None:
    """Against the toy's and the sampler's definitions: chunks, a pause, a neighbour."""
    stages = [make_stage(ToyModelEngine(i, num_stages), i, num_stages) for i in range(num_stages)]
    planner = Planner()
    params = SamplingParams(temperature=1.5, top_k=30, top_p=0.9)
    prompt = [5, 6, 7, 8, 9, 10]
    request, neighbour = planner.add(prompt, sampling=params, seed=1234), planner.add([1, 2, 3])

    def step(rows: dict[int, int]) -> None:
        plan = planner.plan(rows)
        planner.enter(plan, run(stages, plan))

    step({1: 4})
    step({1: 2, 2: 3})
    for _ in range(3):
        step({1: 1, 2: 1})
    planner.pause(request)
    planner.pause(neighbour)
    request.slot, neighbour.slot = 5, 0
    step({2: 3})
    step({1: 10})
    step({1: 1})

    def choose(logits: NDArray[np.float32], known: list[int]) -> int:
        return draw(logits.tolist(), params, uniform(1234, 0, len(known) - len(prompt)))

    assert request.outputs == expected_tokens(prompt, 6, choose=choose)
    assert neighbour.outputs == expected_tokens([1, 2, 3], 4)


def test_logprobs_come_by_row_and_prompt_logprobs_by_request() -> None:
    stage = make_stage(ToyModelEngine())
    planner = Planner()
    prompt = [9, 8, 7, 6, 5]
    planner.add([1, 2])
    planner.add(prompt, sampling=SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1))
    truth = [log_softmax(logits) for logits in expected_logits(prompt)]
    entries = []
    for rows in ({2: 3}, {1: 2, 2: 2}):
        plan = planner.plan(rows)
        result = run([stage], plan)
        planner.enter(plan, result)
        assert list(result.prompt_logprobs) == [2]
        entries += result.prompt_logprobs[2]
    assert [entry.token_id for entry in entries] == prompt[1:]
    for entry, logprobs, token in zip(entries, truth, prompt[1:], strict=False):
        assert entry.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert entry.top_ids == [int(np.argmax(logprobs))]
    assert result.tokens[1] == expected_tokens(prompt, 1)[0]
    assert list(result.logprobs) == [1]
    assert result.logprobs[1].logprob == pytest.approx(max(truth[4]), abs=1e-5)
    assert len(result.logprobs[1].top_ids) == 2


@pytest.mark.parametrize("failing_stage", [0, 1, 2])
def test_a_failure_reaches_the_last_stage_and_spares_the_rest(failing_stage: int) -> None:
    engines = [ToyModelEngine(i, 3, on_forward=fail_on(0) if i == failing_stage else None) for i in range(3)]
    stages = [make_stage(engine, i, 3) for i, engine in enumerate(engines)]
    planner = Planner()
    planner.add([1, 2, 3])
    failed = run(stages, planner.plan({1: 3}))
    assert failed.error is not None
    assert failed.error.startswith(f"stage {failing_stage}: RuntimeError: the toy was told to fail")
    assert "toy_model_engine.py" in failed.error
    assert (failed.step, failed.tokens, len(failed.busy)) == (0, [], 3)
    assert [engine.num_forwards for engine in engines] == [1 if i <= failing_stage else 0 for i in range(3)]
    planner.requests[1].num_computed = 0
    again = planner.plan({1: 3})
    assert not again.starts  # the books have it from the failed step, on every stage
    planner.enter(again, run(stages, again))
    assert planner.requests[1].outputs == expected_tokens([1, 2, 3], 1)


def test_a_stage_alone_goes_on_from_its_own_tokens() -> None:
    stage = make_stage(ToyModelEngine(), feeds_back=True)
    planner = Planner()
    requests = [planner.add([first, first + 1, first + 2]) for first in range(3)]
    plans = [planner.plan({1: 3, 2: 2}), planner.plan({1: 1, 2: 1, 3: 3}, feeds_from=0)]
    for plan in plans:
        planner.enter(plan, run([stage], plan))
    for _ in range(4):
        plan = planner.plan({1: 1, 2: 1, 3: 1}, feeds_from=plan.step)
        planner.enter(plan, run([stage], plan))
    for first, (request, number) in enumerate(zip(requests, (6, 5, 5), strict=True)):
        assert request.outputs == expected_tokens([first, first + 1, first + 2], number)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_first_of_several_executes_a_plan_ahead_once_it_is_fed(num_stages: int) -> None:
    """The plan goes on from step 0; step 1 between them need not have been fed."""
    stages = [make_stage(ToyModelEngine(i, num_stages), i, num_stages, feeds_back=True) for i in range(num_stages)]
    planner = Planner()
    one, two = planner.add([1, 2, 3]), planner.add([4, 5, 6])
    first, between = planner.plan({1: 3}), planner.plan({2: 3})
    ahead = planner.plan({1: 1}, feeds_from=first.step)
    results = [run(stages, first), run(stages, between)]
    assert not stages[0].can_execute(ahead)
    with pytest.raises(AssertionError, match="step 2 goes on from tokens that are not here"):
        stages[0].execute(ahead, None)
    stages[0].feed(first.step, results[0].tokens)
    assert stages[0].can_execute(ahead)
    results.append(run(stages, ahead))
    for plan, result in zip((first, between, ahead), results, strict=True):
        planner.enter(plan, result)
    assert one.outputs == expected_tokens([1, 2, 3], 2)
    assert two.outputs == expected_tokens([4, 5, 6], 1)
    last = planner.plan({1: 1, 2: 1}, feeds_from=between.step)
    assert not stages[0].can_execute(last)
    stages[0].feed(between.step, results[1].tokens)
    assert stages[0].can_execute(last), "what comes after the step that it goes on from is known"


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_as_many_tokens_are_fed_as_the_step_samples(num_tokens: int) -> None:
    stages = [make_stage(ToyModelEngine(i, 2), i, 2, feeds_back=True) for i in range(2)]
    planner = Planner()
    planner.add([1, 2, 3])
    planner.add([4, 5, 6])
    plan = planner.plan({1: 3, 2: 3})
    run(stages, plan)
    with pytest.raises(ValueError, match=f"{num_tokens} tokens for 2 rows"):
        stages[0].feed(plan.step, [7] * num_tokens)
    with pytest.raises(KeyError):
        stages[0].feed(plan.step + 1, [7, 7])


def test_a_failed_step_feeds_nothing_and_keeps_nobody_waiting() -> None:
    stages = [make_stage(ToyModelEngine(i, 2), i, 2, feeds_back=True) for i in range(2)]
    stages[1]._model_engine.on_forward = fail_on(1)  # type: ignore[attr-defined]
    planner = Planner()
    planner.add([1, 2, 3])
    planner.add([4, 5, 6])
    first, failing = planner.plan({2: 3}), planner.plan({1: 3})
    planner.enter(first, run(stages, first))
    stages[0].feed(first.step, planner.requests[2].outputs)
    failed = run(stages, failing)
    assert failed.error is not None
    ahead = planner.plan({1: 1, 2: 1}, feeds_from=failing.step)
    assert not stages[0].can_execute(ahead)
    stages[0].feed(failing.step, failed.tokens)
    result = run(stages, ahead)
    assert result.error is None
    assert result.tokens[1:] == expected_tokens([4, 5, 6], 2)[1:], "whoever was not in the failed step"


def test_a_plan_ahead_is_not_survived_where_nobody_feeds() -> None:
    stage = make_stage(ToyModelEngine())
    planner = Planner()
    planner.add([1, 2, 3])
    run([stage], planner.plan({1: 3}))
    with pytest.raises(AssertionError, match="step 1 was made ahead of its tokens, which nobody feeds here"):
        stage.execute(planner.plan({1: 1}, feeds_from=0), None)


def test_a_failing_sampler_is_a_failed_step_and_a_sampler_can_be_replaced() -> None:
    class Broken(BatchSampler):
        def sample(self, logits: Any, slots: Any, positions: Any) -> Any:
            raise ValueError("no dice")

    class Always7(BatchSampler):
        def __init__(self, slots: SlotTable, vocab_size: int) -> None:
            assert vocab_size == VOCAB_SIZE
            super().__init__(slots, vocab_size)

        def sample(self, logits: Any, slots: Any, positions: Any) -> Any:
            return [7] * len(slots), {}

    class TooMany(BatchSampler):
        def sample(self, logits: Any, slots: Any, positions: Any) -> Any:
            return [7] * (len(slots) + 1), {}

    for make_sampler, tokens, error in (
        (Broken, [], "stage 0: ValueError: no dice"),
        (Always7, [7], None),
        (TooMany, [], "stage 0: ValueError: the sampler gave 2 tokens for 1 rows"),
    ):
        planner = Planner()
        planner.add([1, 2, 3])
        result = run([make_stage(ToyModelEngine(), make_sampler=make_sampler)], planner.plan({1: 3}))
        assert result.tokens == tokens
        assert (result.error or "").startswith(error or "")


@pytest.mark.parametrize("index", [0, 1])
def test_a_failure_on_a_device_that_is_broken_is_the_stages_end(index: int) -> None:
    stages = [make_stage(BreakableToy(i, 2, at=index, poison=13), i, 2) for i in range(2)]
    planner = Planner()
    planner.add([1, 2, 3])
    planner.add([5, 13])
    assert run(stages, planner.plan({1: 3})).error is None
    with pytest.raises(EngineDeadError, match="the device computes nothing any more: the context is corrupt\n") as died:
        run(stages, planner.plan({2: 2}))
    assert f"seen first when step 1 failed: stage {index}: RuntimeError: an illegal memory access" in str(died.value)


def test_the_device_is_looked_at_only_where_the_stage_itself_failed_and_has_let_go_of_the_failure() -> None:
    class Watched(ToyModelEngine):
        looked = 0

        def check_device(self) -> None:
            self.looked += 1
            assert sys.exc_info() == (None, None, None)

    engines = [Watched(i, 3, on_forward=fail_on(1) if i == 1 else None) for i in range(3)]
    stages = [make_stage(engine, i, 3) for i, engine in enumerate(engines)]
    planner = Planner()
    planner.add([1, 2, 3])
    for number in range(3):
        assert (run(stages, planner.plan({1: 1})).error is None) == (number != 1)
    assert [engine.looked for engine in engines] == [0, 1, 0]


def test_a_step_without_samples_has_no_tokens() -> None:
    stage = make_stage(ToyModelEngine())
    planner = Planner()
    planner.add([1, 2, 3])
    result = run([stage], planner.plan({1: 2}))
    assert (result.tokens, result.logprobs, result.prompt_logprobs, result.error) == ([], {}, {}, None)


def test_each_stage_adds_when_it_was_busy() -> None:
    stages = [make_stage(ToyModelEngine(i, 2), i, 2) for i in range(2)]
    planner = Planner()
    planner.add([1, 2, 3])
    assert run(stages, planner.plan({1: 1})).busy == [(0.0, 1.0), (0.0, 1.0)]
    assert run(stages, planner.plan({1: 1})).busy == [(2.0, 3.0), (2.0, 3.0)]


def test_a_plan_against_the_books_is_not_survived() -> None:
    stage = make_stage(ToyModelEngine())
    planner = Planner()
    planner.add([1, 2, 3])
    plan = planner.plan({1: 2})
    plan.starts.clear()
    with pytest.raises(AssertionError):
        stage.execute(plan, None)


def test_release_is_callable_twice_and_at_once() -> None:
    engine = ToyModelEngine()
    stage = Stage(engine, BatchSampler, index=0, num_stages=1, max_num_seqs=8)
    stage.release()
    stage.release()
    assert engine.released


@pytest.mark.parametrize("damage", ["block", "position", "stale"])
def test_the_toy_notices_every_damage_to_its_cache(damage: str) -> None:
    """What the engine's tests rely on: a wrong block or position or a lost key changes the tokens."""
    engine = ToyModelEngine()
    stage, planner = make_stage(engine), Planner()
    request = planner.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    plan = planner.plan({1: 9})
    planner.enter(plan, run([stage], plan))
    plan = planner.plan({1: 1})
    if damage == "block":
        request.blocks[1] = request.blocks[0]
        planner.pause(request)
        request.blocks, request.num_computed = [1, 1, 3], 9
        plan = planner.plan({1: 1})
        assert plan.starts
    elif damage == "position":
        plan.decode_positions = [8]
    else:
        engine.pools[1][1 * 4 + 2] += np.uint64(1)
    assert run([stage], plan).tokens != expected_tokens([1, 2, 3, 4, 5, 6, 7, 8, 9], 2)[1:]


def test_no_torch_is_loaded_for_numpy_logits() -> None:
    program = """
import sys
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.workers.sampler import BatchSampler
from llm_engine.workers.stage import Stage
from tests.plans import Planner
from tests.toy_model_engine import ToyModelEngine
stage = Stage(ToyModelEngine(), BatchSampler, index=0, num_stages=1, max_num_seqs=8)
stage.load()
stage.allocate(9, 4)
planner = Planner()
planner.add([1, 2], sampling=SamplingParams(top_p=0.9, logprobs=2))
assert len(stage.execute(planner.plan({1: 2}), None).tokens) == 1
assert "torch" not in sys.modules
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=root)


def test_a_model_engine_that_lacks_a_method_is_named_before_it_is_needed() -> None:
    assert set(METHODS) == {name for name in vars(ModelEngine) if not name.startswith("_")}
    with pytest.raises(
        ModelLoadError, match=r"object is no model engine: no load, allocate, forward, check_device, rel"
    ):
        Stage(object(), BatchSampler, index=0, num_stages=1, max_num_seqs=8)  # type: ignore[arg-type]
