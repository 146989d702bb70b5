"""Looking ahead changes no answer: everything a request can ask for, through the library's face, with and without."""

from __future__ import annotations

import threading
from dataclasses import astuple
from typing import Any

import pytest

from llm_engine import LLM, SamplingParams
from llm_engine.core.outputs import RequestOutput
from tests.engine.engines import SECONDS, Valve, await_state, greedy, tokens_of, toy_llm
from tests.toy_model_engine import expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")

PROMPTS = ("Once upon a time, there was", "47 + 85 =", "Hello", "The capital of France is", "One, two, three,", "In")


def drawn(**more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.2, "max_tokens": 24, "seed": 11, **more})


FEATURES = {
    "greedy": greedy(24),
    "seeded": drawn(),
    "truncated": drawn(top_k=40, top_p=0.9, min_p=0.02),
    "penalties": drawn(repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.4),
    "greedy with penalties": greedy(24, repetition_penalty=1.5, frequency_penalty=0.8),
    "bias": drawn(logit_bias={300: 4.0, 301: 3.0, 5: -100}),
    "allowed ids": drawn(allowed_token_ids=list(range(260, 330))),
    "min_tokens": greedy(24, min_tokens=20),
    "bad words": drawn(bad_words=["the", "a", "and then", "."]),
    "stop strings": drawn(stop=["e", "an"], max_tokens=60),
    "stop ids": drawn(stop_token_ids=list(range(260, 400, 3)), max_tokens=60),
    "logprobs": greedy(24, logprobs=3),
    "drawn logprobs": drawn(logprobs=2, presence_penalty=0.5),
    "prompt logprobs": drawn(prompt_logprobs=2, logprobs=1),
    "choices": drawn(n=3, logprobs=0),
}


def answers(settings: dict[str, Any]) -> tuple[list[RequestOutput], int]:
    """Every feature beside every other in one batch; and how many steps were made ahead."""
    params = list(FEATURES.values())
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    with LLM(device="cpu", cpu_threads=1, **{"num_kv_blocks": 600, **settings}) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return outputs, sum(stats.ahead for stats in llm.get_stats())


@pytest.fixture(scope="module")
def plain() -> list[RequestOutput]:
    outputs, num_ahead = answers({"schedule_ahead": False})
    assert num_ahead == 0
    return outputs


def numbers(entries: Any) -> list[float]:
    """The log-probabilities of some entries, flat, and the ids they are of."""
    return [
        number
        for entry in entries or ()
        if entry is not None
        for value in astuple(entry)
        for number in (value if isinstance(value, list) else [value])
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipeline_parallel_size": 2, "executor": "inproc", "max_num_batched_tokens": 24},
        {"num_queues": 3, "max_num_batched_tokens": 16},
        {"num_kv_blocks": 40, "block_size": 4, "max_model_len": 128},
    ],
    ids=["1 stage", "2 stages", "3 queues on 1 stage", "scarce memory"],
)
def test_every_feature_answers_the_same(settings: dict[str, Any], plain: list[RequestOutput]) -> None:
    outputs, num_ahead = answers(settings)
    assert num_ahead > 0
    for name, output, expected in zip(FEATURES, outputs, plain, strict=True):
        assert output.prompt_token_ids == expected.prompt_token_ids
        for choice, right in zip(output.outputs, expected.outputs, strict=True):
            assert (choice.token_ids, choice.text) == (right.token_ids, right.text), name
            assert (choice.finish_reason, choice.stop_reason) == (right.finish_reason, right.stop_reason), name
            assert numbers(choice.logprobs) == pytest.approx(numbers(right.logprobs), abs=1e-4), name
        assert numbers(output.prompt_logprobs) == pytest.approx(numbers(expected.prompt_logprobs), abs=1e-4), name


# -- on the toy, with real threads


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("queues", [None, 1, 4])
def test_a_tight_pool_comes_to_an_end(stages: int, queues: int | None) -> None:
    """Plans ahead are refused all the time for want of blocks, requests pause, stop ids are learnt late; everybody who
    waits for the books is woken."""
    prompts = [[number % 7, 7, 7, 7, number % 3, *range(number % 6)] for number in range(40)]
    params = [greedy(18, stop_token_ids=[3, 40, 41]) for _ in prompts]
    with toy_llm(stages=stages, num_kv_blocks=14, num_queues=queues, max_num_seqs=6) as llm:
        futures = [llm.submit(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        outputs = [future.result(SECONDS) for future in futures]
        for prompt, output in zip(prompts, outputs, strict=True):
            assert tokens_of(output) == expected_tokens(prompt, 18, stop_ids=(3, 40, 41))
        stats = llm.get_stats()
        num_ahead = sum(step.ahead for step in stats)
        assert num_ahead if stages == 1 else queues != 1 or not num_ahead
        assert sum(output.metrics.num_preemptions for output in outputs)
        await_state(llm.engine, lambda: llm.engine.state.core.is_idle)
        llm.engine.state.core.check_integrity()
        assert llm.engine.kv.usage == 0.0


def test_a_step_stands_ready_while_the_one_before_is_computed() -> None:
    """What it is all for: the stage has its next plan before its result was seen by anybody."""
    valve = Valve()
    with toy_llm(on_forward=valve) as llm:
        future = llm.submit([1, 2, 3], greedy(5))
        valve.await_arrival(1)
        valve.let_through()
        valve.await_arrival(2)
        in_flight = llm.engine.state.core.in_flight
        await_state(llm.engine, lambda: [flight.plan.step for flight in in_flight] == [2, 3])
        assert in_flight[1].plan.feeds_from == 2
        valve.open()
        assert tokens_of(future.result(SECONDS)) == expected_tokens([1, 2, 3], 5)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_an_end_from_outside_with_two_steps_in_flight(how: str) -> None:
    valve = Valve()
    with toy_llm(on_forward=valve) as llm:
        stream = llm.stream([1, 2, 3], greedy(50))
        valve.await_arrival(1)
        valve.let_through()
        assert tokens_of(next(stream)) == expected_tokens([1, 2, 3], 1)
        await_state(llm.engine, lambda: len(llm.engine.state.core.in_flight) == 2)
        if how == "cancel":
            stream.cancel()
            await_state(llm.engine, lambda: not len(llm.engine.state.core.table))
            assert llm.engine.kv.usage == 0.0
            valve.open()
            assert not [token for part in stream for token in tokens_of(part)]
            assert tokens_of(llm.generate([[4, 5]], greedy(4), use_tqdm=False)[0]) == expected_tokens([4, 5], 4)
        else:
            closing = threading.Thread(target=llm.close)
            closing.start()
            valve.open()
            closing.join(SECONDS)
            assert not closing.is_alive()
