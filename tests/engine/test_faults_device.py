"""A device that breaks in a step and computes nothing from then on: not one more request fails for it than must."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_engine import LLM, EngineDeadError, RequestFailedError
from tests.engine.engines import SECONDS, await_state, greedy, tokens_of
from tests.toy_model_engine import BreakableToy, expected_tokens
from tests.toy_stages import make_stage, tell_stages

PROMPTS = ([1, 2, 3], [4, 5], list(range(20, 32)))
POISON = 13
NUM_TOKENS = 8


def engine() -> LLM:
    return LLM(model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=50, block_size=4)


def check_answers(llm: LLM) -> None:
    outputs = llm.generate([list(prompt) for prompt in PROMPTS], greedy(NUM_TOKENS), use_tqdm=False)
    assert [tokens_of(output) for output in outputs] == [expected_tokens(p, NUM_TOKENS) for p in PROMPTS]


@pytest.mark.parametrize("at", [0, 1])
def test_stages_whose_device_breaks_are_started_again_and_nobody_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int
) -> None:
    hammer = tmp_path / "hammer"
    tell_stages(monkeypatch, 2, engine_class=BreakableToy, at=at, hammer=str(hammer))
    with engine() as llm:
        check_answers(llm)
        hammer.touch()
        check_answers(llm)
        assert not hammer.exists()
        assert llm.engine.state.num_restarts == 1
        check_answers(llm)
        assert llm.is_ready


def test_a_request_that_breaks_the_device_fails_at_the_second_time_and_the_engine_lives_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = [expected_tokens(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert not any(POISON in tokens for tokens in right), "nobody else meets it"
    tell_stages(monkeypatch, 2, engine_class=BreakableToy, at=1, poison=POISON)
    with engine() as llm:
        check_answers(llm)
        error = llm.submit([7, POISON, 7], greedy(NUM_TOKENS)).exception(SECONDS)
        assert isinstance(error, RequestFailedError)
        assert "in flight when the stages died, twice: stage 1 died: the device computes nothing any more" in str(error)
        check_answers(llm)
        assert llm.engine.state.num_restarts == 2
        assert llm.is_ready


def test_where_nothing_can_be_started_again_the_engine_ends_and_says_so() -> None:
    llm = LLM(
        model_engine=lambda stage: BreakableToy(stage, 1, poison=POISON), executor="inproc", num_kv_blocks=50,
        block_size=4,
    )  # fmt: skip
    with llm:
        check_answers(llm)
        error = llm.submit([7, POISON, 7], greedy(NUM_TOKENS)).exception(SECONDS)
        assert isinstance(error, EngineDeadError)
        assert "stage 0 died: " in str(error)
        assert "the device computes nothing any more: the context is corrupt" in str(error)
        await_state(llm.engine, lambda: not llm.is_ready)
        with pytest.raises(EngineDeadError, match="computes nothing any more"):
            llm.submit([1], greedy(1))


def test_a_request_that_only_fails_its_own_steps_costs_nobody_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it comes: the stages compute everything else, and would not do better after a restart."""
    tell_stages(monkeypatch, 2, {0: ("failing", *range(10))})
    with engine() as llm:
        for _ in range(10):
            with pytest.raises(RequestFailedError, match="the toy was told to fail"):
                llm.submit([1, 2, 3], greedy(NUM_TOKENS)).result(SECONDS)
        check_answers(llm)
        assert llm.engine.state.num_restarts == 0
