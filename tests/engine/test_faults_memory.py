"""Steps that fail for want of memory, on real stages: their requests fail, nobody else does, and nothing that they
wrote, or that was built on it, is found in the prefix cache."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from llm_engine import LLM, RequestFailedError, RequestOutput
from llm_engine.models.hub import DEMO_MODEL
from llm_engine.workers.batch import StageBatch
from llm_engine.workers.torch_model_engine import TorchModelEngine
from tests.engine.engines import SECONDS, await_state, greedy, tokens_of
from tests.toy_model_engine import ToyModelEngine, expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")

SHARED = list(range(30, 62))
PROMPTS = ([*SHARED, 1], [*SHARED, 2, 3], [9, 8, 7], [*SHARED, *range(20)])
"""Three share a prefix of four chunks, which later ones find while it is still in the pipeline."""
NUM_TOKENS = 6


def allocate_too_much(library: str) -> None:
    """What the machine really says to that."""
    if library == "python":
        bytearray(1 << 62)
    else:
        torch.empty(1 << 60, dtype=torch.uint8)


ERRORS = {"python": "MemoryError", "torch": "allocate memory"}


class ShortToy(ToyModelEngine):
    """In one forward it overwrites what it should have written, and then finds no memory."""

    def __init__(self, stage: int, number: int | None, library: str) -> None:
        super().__init__(stage, 2)
        self._number, self._library = number, library

    def forward(self, batch: StageBatch, hidden: Any) -> Any:
        if self.num_forwards == self._number:
            self.num_forwards += 1
            for pool in self.pools:
                pool[batch.slot_mapping] = 0xBAD
            allocate_too_much(self._library)
        return super().forward(batch, hidden)


class ShortTorch(TorchModelEngine):
    """The real model, which finds no memory after one of its forwards has written everything."""

    short_at: int | None = None
    num_forwards = 0

    def forward(self, batch: StageBatch, hidden: Any) -> Any:
        output = super().forward(batch, hidden)
        self.num_forwards += 1
        if self.num_forwards - 1 == self.short_at:
            allocate_too_much("torch")
        return output


def ask(llm: LLM) -> list[Future[RequestOutput]]:
    return [llm.submit(prompt, greedy(NUM_TOKENS, ignore_eos=True)) for prompt in PROMPTS]


def check(llm: LLM, futures: list[Future[RequestOutput]], right: list[list[int]], saying: str) -> int:
    """Everybody has the right tokens or the cause; returns how many failed."""
    num_failed = 0
    for future, tokens in zip(futures, right, strict=True):
        error = future.exception(SECONDS)
        if error is None:
            assert tokens_of(future.result()) == tokens
        else:
            assert isinstance(error, RequestFailedError)
            assert saying in str(error)
            num_failed += 1
    core = llm.engine.state.core
    await_state(llm.engine, lambda: core.is_idle)
    core.check_integrity()
    assert core.kv.usage == 0.0
    assert llm.is_ready
    return num_failed


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("library", ["python", "torch"])
def test_a_step_without_memory_fails_its_requests_and_leaves_no_trace(stage: int, library: str, ahead: bool) -> None:
    right = [expected_tokens(prompt, NUM_TOKENS) for prompt in PROMPTS]
    failed = []
    for number in range(14):

        def make(index: int, number: int = number) -> ToyModelEngine:
            return ShortToy(index, number if index == stage else None, library)

        with LLM(
            model_engine=make, pipeline_parallel_size=2, executor="inproc", num_kv_blocks=200, block_size=4,
            max_num_batched_tokens=8, schedule_ahead=ahead,
        ) as llm:  # fmt: skip
            failed.append(check(llm, ask(llm), right, f"stage {stage}: "))
            assert check(llm, ask(llm), right, "") == 0, "what it left in the cache would show now"
            assert llm.engine.state.core.epoch == 0
    assert min(failed) == 1, "a step that carries one request fails one"


@pytest.mark.parametrize("stage", [0, 1])
def test_the_real_model_without_memory_for_a_step(stage: int) -> None:
    made: list[ShortTorch] = []

    def make(index: int) -> TorchModelEngine:
        made.append(ShortTorch(str(DEMO_MODEL), stage=index, num_stages=2, device="cpu", num_threads=1))
        return made[-1]

    with LLM(
        model_engine=make, pipeline_parallel_size=2, executor="inproc", num_kv_blocks=200, block_size=4,
        max_num_batched_tokens=8,
    ) as llm:  # fmt: skip
        right = [tokens_of(future.result(SECONDS)) for future in ask(llm)]
        for ahead in range(NUM_TOKENS):  # so many forwards there are at least
            engine = made[stage]
            engine.short_at = engine.num_forwards + ahead
            assert check(llm, ask(llm), right, "allocate memory") >= 1
            assert check(llm, ask(llm), right, "") == 0
