"""One model with plans made ahead of their tokens and without, in turn: what ``benchmarks.schedule_ahead`` runs in a
process of its own.

    python -m benchmarks.schedule_ahead_turn MODEL --threads 1 --batch 1 16 64 --rounds 5 --output-tokens 128

prints a JSON line per batch, round and side. Two engines stand side by side, one stage each, and take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.transports.driver import percentile
from benchmarks.workloads import Workload, make_prompts

if TYPE_CHECKING:
    from llm_engine import LLM
    from llm_engine.core.trace import StepStats

PROMPT_TOKENS = 32
SIDES = {"off": False, "on": True}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint, or demo")
    parser.add_argument("--executor", default="inproc")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    args = parser.parse_args()
    # As `llm-engine` has it, and before torch is loaded: long spinning hurts whoever shares the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with ExitStack() as stack:
        engines = {
            side: stack.enter_context(open_engine(args.model, args.executor, args.threads, max(args.batch), ahead))
            for side, ahead in SIDES.items()
        }
        for llm in engines.values():
            answer(llm, max(args.batch), 8, seed=0)
        for batch in args.batch:
            for number in range(args.rounds):
                order = list(engines) if number % 2 == 0 else list(reversed(engines))
                for side in order:
                    found = measure(engines[side], batch, args.output_tokens, seed=1 + number)
                    print(json.dumps({"side": side, "batch": batch, "round": number, **found}), flush=True)


def open_engine(model: str, executor: str, threads: int, batch: int, ahead: bool) -> LLM:
    """One stage, as the library starts it."""
    from llm_engine import LLM

    return LLM(
        model=None if model == "demo" else model,
        device="cpu",
        dtype="bfloat16",
        executor=executor,
        cpu_threads=threads,
        num_kv_blocks=batch * 64 + 1,
        enable_prefix_caching=False,
        schedule_ahead=ahead,
    )


def answer(llm: LLM, batch: int, output_tokens: int, seed: int) -> tuple[list[list[int]], list[StepStats]]:
    """So many requests, submitted at once: their tokens, and the steps in which all of them decoded."""
    from llm_engine import SamplingParams

    highest = llm.engine.info.model.vocab_size
    prompts = make_prompts(Workload(batch, 0, PROMPT_TOKENS, output_tokens), seed)
    prompts = [[token % highest for token in prompt] for prompt in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    began = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    steps = [step for step in llm.get_stats() if step.began_at >= began]
    decodes = [step for step in steps if step.num_decodes == batch and not step.num_chunks]
    return [output.outputs[0].token_ids for output in outputs], decodes


def measure(llm: LLM, batch: int, output_tokens: int, seed: int) -> dict[str, Any]:
    """Figures of the steps in which the whole batch decodes; the first of them are left out."""
    tokens, steps = answer(llm, batch, output_tokens, seed)
    return {
        **figures(steps[2:], batch),
        "num_ahead": sum(step.ahead for step in steps),
        "tokens_digest": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
    }


def figures(steps: Sequence[StepStats], batch: int) -> dict[str, Any]:
    """Of steps that follow each other on one stage.

    A step is the stage's busy span; the gap, from its end to the next one's begin, is the time the stage has nothing to
    do. ``idle_percent`` is the gaps' share of all the time.
    """
    spans = [step.busy[0] for step in steps]
    gaps = [after[0] - this[1] for this, after in pairwise(spans)]
    itl = [after[1] - this[1] for this, after in pairwise(spans)]
    step = percentile([end - begin for begin, end in spans], 0.5)
    return {
        "num_steps": len(steps),
        "step_p50_us": 1e6 * step,
        "gap_p50_us": 1e6 * percentile(gaps, 0.5),
        "gap_p99_us": 1e6 * percentile(gaps, 0.99),
        "gap_p50_percent": 100 * percentile(gaps, 0.5) / step,
        "gap_p99_percent": 100 * percentile(gaps, 0.99) / step,
        "idle_percent": 100 * sum(gaps) / sum(itl),
        "itl_p50_us": 1e6 * percentile(itl, 0.5),
        "itl_p99_us": 1e6 * percentile(itl, 0.99),
        "tokens_per_s": batch * len(itl) / sum(itl),
    }


if __name__ == "__main__":
    main()
