"""Greedy tokens equal transformers' in float32 under every triple, on one stage and on two, from a cache so small that
each capacity has to act, and with wishes that make each ordering act."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from llm_engine import LLM, SamplingParams
from llm_engine.core.outputs import RequestOutput
from llm_engine.core.trace import StepStats
from llm_engine.schedulers.chunking import CHUNKINGS
from llm_engine.schedulers.registry import CAPACITIES, ORDERINGS
from tests.schedulers.triples import NEVER_PAUSE, TRIPLES, Triple

from .conftest import Case
from .test_greedy_parity import stages

NUM_PROMPTS, NUM_TOKENS = 7, 24
LONGEST = 20
"""Blocks of 8 that the longest prompt of 136 tokens and its answer come to."""
SMALL: Mapping[str, dict[str, Any]] = {
    "max-requests": {"max_num_seqs": 2, "num_kv_blocks": 1 + 2 * LONGEST},
}
"""Where only requests are counted the cache must hold them all."""
SMALL_OF_OTHERS = {"max_num_seqs": 8, "num_kv_blocks": 1 + LONGEST + 8}


def _waited_for_memory(steps: Sequence[StepStats]) -> bool:
    """Somebody waited although there were seats."""
    return any(step.num_waiting and step.num_running < SMALL_OF_OTHERS["max_num_seqs"] for step in steps)


def _waited_for_a_seat(steps: Sequence[StepStats]) -> bool:
    return any(step.num_waiting and step.num_running == SMALL["max-requests"]["max_num_seqs"] for step in steps)


def _waited_for_the_whole_batch(steps: Sequence[StepStats]) -> bool:
    """The batch shrank to its last request while others waited, and then nearly nothing was held."""
    return any(step.num_waiting and step.num_running == 1 and step.kv_usage < 0.5 for step in steps)


ACTED = {
    "max-utilization": lambda steps: sum(step.num_paused for step in steps) > 0,
    "guaranteed-no-evict": _waited_for_memory,
    "static-batch": _waited_for_the_whole_batch,
    "max-requests": _waited_for_a_seat,
}


def params(number: int) -> SamplingParams:
    """The later, the shorter."""
    return SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS - number, ignore_eos=True)


def wishes(triple: Triple, number: int) -> dict[str, Any]:
    """The last comes first wherever a wish can bring that about."""
    wish: dict[str, Any] = {"tenant": "greedy" if number < NUM_PROMPTS else f"tenant {number}"}
    knows = ORDERINGS.get(triple.ordering).knows  # type: ignore[attr-defined]
    if "priority" in knows:
        wish["priority"] = -number
    if "deadline_ms" in knows:
        wish["deadline_ms"] = 1e7 - 1e5 * number
    return wish


def check(case: Case, triple: Triple, **settings: Any) -> None:
    small = SMALL.get(triple.capacity, SMALL_OF_OTHERS)
    settings = {**triple.settings, **small, "block_size": 8, "max_num_batched_tokens": 48, **settings}
    with LLM(str(case.path), device="cpu", **settings) as llm:
        prompts = case.prompts * 2  # the second time their prefixes can be found
        with llm.engine.state.changed:  # they arrive at once
            futures = [llm.submit(prompt, params(n), **wishes(triple, n)) for n, prompt in enumerate(prompts)]
        outputs = [future.result(60) for future in futures]
        steps = llm.get_stats()
    for number, (output, answer) in enumerate(zip(outputs, case.answers * 2, strict=True)):
        assert output.outputs[0].token_ids == answer[: NUM_TOKENS - number]
    if triple.capacity in NEVER_PAUSE:
        assert not any(output.metrics.num_preemptions for output in outputs)
    assert ACTED[triple.capacity](steps), "the capacity had nothing to do"
    if triple.ordering != "fcfs":
        assert admission(outputs) != list(range(2 * NUM_PROMPTS)), "the ordering had nothing to do"


def admission(outputs: Sequence[RequestOutput]) -> list[int]:
    """Who was scheduled when, ties by arrival."""
    return sorted(range(len(outputs)), key=lambda number: outputs[number].metrics.first_scheduled or 0.0)


def test_each_capacity_is_held_to_having_acted() -> None:
    assert list(ACTED) == CAPACITIES.names()


def everywhere() -> list[Any]:
    """Every triple on one stage and on two; in the quick suite each but for the chunking once: half of them on one
    stage, half on two, and of either half every second with the other way of chunking."""
    cases = []
    for number, triple in enumerate(TRIPLES):
        for count in (1, 2):
            pair = number // len(CHUNKINGS)
            is_quick = count == 1 + pair % 2 and triple.chunking == CHUNKINGS[pair // 2 % len(CHUNKINGS)]
            marks = () if is_quick else pytest.mark.slow
            cases.append(pytest.param(triple, count, id=f"{triple}-{count}", marks=marks))
    return cases


@pytest.mark.parametrize(("triple", "num_stages"), everywhere())
def test_every_triple(triple: Triple, num_stages: int, case_of: Callable[[str, int], Case]) -> None:
    check(case_of("llama-3", NUM_PROMPTS), triple, **stages(num_stages))


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("triple", TRIPLES[:: len(TRIPLES) // 7], ids=str)
def test_processes(triple: Triple, num_stages: int, case_of: Callable[[str, int], Case]) -> None:
    check(case_of("llama-3", NUM_PROMPTS), triple, **stages(num_stages, "zmq"))
