"""What real stages of a model take for a step: the real torch model and sampler, in one thread on one core.

Seconds are of CPU time, so that what else runs on the core is not counted; what it does to the caches is.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.workloads import HIGHEST_ID, LOWEST_ID
from llm_engine.core.cost_model import StepShape
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan, StepResult
from llm_engine.models.spec import ModelSpec
from llm_engine.workers.sampler import BatchSampler
from llm_engine.workers.stage import Stage, StageOutput
from llm_engine.workers.torch_model_engine import TorchModelEngine

BLOCK_SIZE = 16
NUM_BLOCKS = 1 + 64 * (512 // BLOCK_SIZE)
MIN_SECONDS, MIN_REPEATS = 0.25, 5


@dataclass(frozen=True, slots=True)
class Step:
    """A batch of decodes, each so many tokens into its text, or one prompt's chunk that is sampled at its end."""

    kind: str
    size: int
    """Rows of decodes, tokens of the chunk."""
    context: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size}"

    @property
    def shape(self) -> StepShape:
        if self.kind == "decode":
            keys = self.size * (self.context + 1)
            return StepShape(self.size, keys, num_sampled=self.size, num_rows=self.size, kv_tokens=keys)
        return StepShape(self.size, self.size * (self.size + 1) // 2, num_sampled=1, num_rows=1, kv_tokens=self.size)

    def plan(self, vocab_size: int) -> StepPlan:
        """The step for a stage that has seen nothing yet: it starts its requests."""
        if self.kind == "decode":
            rows, known = self.size, self.context + 1
            starts = [_start(row, known, vocab_size) for row in range(rows)]
            return StepPlan(
                queue=0,
                decode_ids=[start.request_id for start in starts],
                decode_slots=list(range(rows)),
                decode_positions=[self.context] * rows,
                decode_tokens=[start.token_ids[-1] for start in starts],
                starts=starts,
            )
        start = _start(0, self.size, vocab_size)
        return StepPlan(
            queue=0,
            chunk_ids=[start.request_id],
            chunk_slots=[0],
            chunk_starts=[0],
            chunk_tokens=[self.size],
            chunk_samples=[True],
            starts=[start],
        )


STEPS = (
    Step("decode", 1, 256),
    Step("decode", 16, 256),
    Step("decode", 64, 256),
    Step("prefill", 256),
    Step("prefill", 512),
)


def _start(slot: int, known: int, vocab_size: int) -> RequestStart:
    source = random.Random(slot)
    held = -(-known // BLOCK_SIZE)
    return RequestStart(
        request_id=slot + 1,
        slot=slot,
        token_ids=[source.randrange(LOWEST_ID, min(HIGHEST_ID, vocab_size)) for _ in range(known)],
        num_prompt_tokens=known,
        block_ids=list(range(1 + slot * held, 1 + (slot + 1) * held)),
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        choice_index=0,
        stop_ids=[],
    )


def measure(model: Path, spec: ModelSpec, split: list[int], stage: int) -> dict[str, float]:
    """Load one stage and time it: least seconds of each step, by the step's name. In the calling thread."""
    engine = TorchModelEngine(
        str(model), stage=stage, num_stages=len(split), layer_split=split, device="cpu", num_threads=1
    )
    runner = Stage(engine, BatchSampler, index=stage, num_stages=len(split), max_num_seqs=64)
    dtype = getattr(torch, runner.load().dtype)
    runner.allocate(NUM_BLOCKS, BLOCK_SIZE)
    try:
        return {step.name: _least_seconds(runner, spec, step, dtype) for step in STEPS}
    finally:
        runner.release()


def _least_seconds(runner: Stage, spec: ModelSpec, step: Step, dtype: torch.dtype) -> float:
    plan = step.plan(spec.vocab_size)
    received = None
    if runner.index:
        torch.manual_seed(0)
        received = StageOutput(torch.randn(plan.num_tokens, spec.hidden_size).to(dtype))
    _execute(runner, plan, received)  # the requests start, and what is made at a first step is made
    plan.starts = []
    times: list[float] = []
    while sum(times) < MIN_SECONDS or len(times) < MIN_REPEATS:
        began = time.thread_time()
        _execute(runner, plan, received)
        times.append(time.thread_time() - began)
    return min(times)


def _execute(runner: Stage, plan: StepPlan, received: StageOutput | None) -> None:
    output: StageOutput | StepResult = runner.execute(plan, received)
    assert output.error is None, output.error
