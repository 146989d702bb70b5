"""What a step trace costs: the time to make and keep a step's record, over the time of the step.

    python -m benchmarks.trace_cost              # the bundled model, the smallest; --model DIR for another

An engine makes the record of each step under its lock, traced or not; a trace keeps more of them. So this is all that
tracing costs while the engine runs. Records are made of the engine's own books, again and again; steps are an engine's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from llm_engine import LLM, SamplingParams
from llm_engine.cli.tables import new_table
from llm_engine.core.config import EngineConfig
from llm_engine.core.step import StepResult
from llm_engine.core.trace import StepStats
from llm_engine.engine.threads.reporting import stats_of
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.setup import set_up
from llm_engine.simulation.workload import fixed

ROWS = (1, 16, 64, 256)
LENGTH = 64
"""Tokens of each prompt whose books are kept, and of each answer."""
OUTPUT = 24
"""Steps of each size that the engine runs."""
STEPS, ROUNDS = 200, 9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="folder of the checkpoint; the bundled model when absent")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="decodes of a step (default: 1 16 64 256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    rows = measure(args.model, args.rows)
    table = new_table("decodes", "record, µs", "step, µs", "share")
    for row in rows:
        times = (f"{1e6 * row['record_s']:.1f}", f"{1e6 * row['step_s']:.0f}")
        table.add_row(str(row["decodes"]), *times, f"{100 * row['share']:.2f} %")
    Console().print(table)
    if args.json is not None:
        result = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine.describe(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(model: str | None, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of decodes."""
    found = []
    with LLM(model, max_num_seqs=max(sizes), enable_prefix_caching=False) as llm:
        for size in sizes:
            record, step = record_seconds(size), step_seconds(llm, size)
            found.append({"decodes": size, "record_s": record, "step_s": step, "share": record / step})
    return found


def record_seconds(num_decodes: int) -> float:
    """To make and keep the record of a step; of the round that was disturbed least."""
    load = fixed(num_decodes, LENGTH, LENGTH)
    engine = EngineConfig.of(scheduler="greedy", max_num_seqs=num_decodes, schedule_ahead=False)
    simulator = set_up(SimulationConfig(stages=1, unlimited_kv=True), engine, arrivals=load).simulator()
    simulator.start_with([num_decodes], LENGTH, LENGTH)
    core = simulator.core
    plan = core.schedule(0.0)
    assert plan is not None and len(plan.decode_ids) == num_decodes
    result = StepResult(plan.epoch, plan.step, [0] * num_decodes, busy=[(1.0, 2.0)])
    retired = core.retire(result, 3.0)
    assert retired is not None
    records: deque[StepStats] = deque(maxlen=STEPS)
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(STEPS):
            records.append(stats_of(retired, result, 2.5, 2.75, 3.0))
        rounds.append((time.perf_counter() - began) / STEPS)
    return min(rounds)


def step_seconds(llm: LLM, num_decodes: int) -> float:
    """Of a step of so many decodes on its stage, without the threads' part: the middle one."""
    prompts = [f"{number}, a number" for number in range(num_decodes)]
    llm.generate(prompts, SamplingParams(max_tokens=OUTPUT, ignore_eos=True), use_tqdm=False)
    steps = [step for step in llm.get_stats() if (step.num_decodes, step.num_chunks) == (num_decodes, 0)]
    return statistics.median(step.busy[0][1] - step.busy[0][0] for step in steps)


if __name__ == "__main__":
    raise SystemExit(main())
