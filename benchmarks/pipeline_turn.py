"""One engine, one mix, once: what ``benchmarks.pipeline`` runs in a process of its own.

    python -m benchmarks.pipeline_turn '{"mix": "decode", "seed": 1, "settings": {"model": DIR, ...}}'

prints one JSON line. ``trace`` and ``timeline`` in the task name files: for a step trace, and for a picture of some
of the measured run. ``cores`` pins this process, and with it the two threads of the engine; stages that have cores of
their own keep them.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload, make_prompts

MIXES = {
    "decode": Workload(256, 0, 16, 128),
    "prefill": Workload(32, 0, 512, 8),
    "many": Workload(256, 0, 64, 64),
    "prompt": Workload(1, 0, 2048, 2),
    "host": Workload(64, 0, 16, 96),
}
TIMELINE_S = 2.0
"""Seconds that a timeline shows."""


def main() -> int:
    """Run the task on the command line."""
    task = json.loads(sys.argv[1])
    if task.get("cores"):
        os.sched_setaffinity(0, task["cores"])
    from llm_engine import LLM

    mix = MIXES[task["mix"]]
    with LLM(**task["settings"]) as llm:
        prompts = make_prompts(mix, seed=2 * task["seed"])
        measure(llm, prompts[: max(len(prompts) // 4, 1)], min(mix.output, 16))  # warms up, and teaches the policy
        figures = measure(llm, make_prompts(mix, seed=2 * task["seed"] + 1), mix.output)
        if task.get("trace"):
            llm.write_trace(task["trace"])
        if task.get("timeline"):
            stages = task["settings"].get("pipeline_parallel_size", 1)
            title = f"{Path(task['settings']['model']).name}, {stages} stages, {task['name']}, {task['mix']}"
            draw(llm.get_stats(), task["timeline"], title)
    print(json.dumps({**figures, "name": task["name"], "mix": task["mix"], "seed": task["seed"]}), flush=True)
    return 0


def measure(llm: Any, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Submit all prompts at once; figures of that run alone."""
    from llm_engine import SamplingParams
    from llm_engine.metrics.pipeline_report import report

    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    start, began = time.perf_counter(), time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    records = [record for record in llm.get_stats() if record.began_at >= began]
    tokens = [output.outputs[0].token_ids for output in outputs]
    found = report(records)
    return {
        "seconds": seconds,
        "output_throughput": sum(map(len, tokens)) / seconds,
        "ttft_s": statistics.fmean(o.metrics.first_token - o.metrics.arrival for o in outputs),
        "stage_busy": list(found.stage_busy),
        "host_overhead_us": [1e6 * overhead.p50, 1e6 * overhead.p99] if (overhead := found.host_overhead) else None,
        "micro_batch_tokens": found.micro_batch_tokens.mean if found.micro_batch_tokens else None,
        "num_steps": len(records),
        "tokens_digest": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
    }


def draw(records: list[Any], path: str, title: str) -> None:
    """A picture of the middle of the last load."""
    from llm_engine.metrics.pipeline_load import split_loads
    from llm_engine.metrics.timeline import plot_timeline

    *_, load = split_loads(records)
    low, high = load[0].began_at, load[-1].retired_at
    begin = max(low, (low + high - TIMELINE_S) / 2)
    plot_timeline(records, path, title=title, begin=begin, end=min(begin + TIMELINE_S, high))


if __name__ == "__main__":
    sys.exit(main())
