"""The figures of a run, as they go into the table and the JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .simulator import SimulationRun


def figures(run: SimulationRun) -> dict[str, Any]:
    """The JSON keys of ``llm-engine simulate``: seconds, tokens and shares; docs/simulation.md says what each is."""
    elapsed = run.makespan or 1.0  # nothing was served: zeros
    num_stages = max(len(run.stage_busy), 1)
    return {
        "makespan_s": run.makespan,
        "output_throughput": run.num_output_tokens / elapsed,
        "request_throughput": len(run.e2es) / elapsed,
        "ttft_s": spread(run.ttfts),
        "itl_s": spread(run.itls),
        "e2e_s": spread(run.e2es),
        "stage_busy": run.stage_busy,
        "stage_busy_overall": [seconds / elapsed for seconds in run.busy_seconds],
        "bubble_fraction": 1.0 - sum(run.stage_busy) / num_stages,
        "full_s": sum(end - begin for begin, end in run.loads),
        "micro_batch_tokens": micro_batch_tokens(run),
        "imbalance": imbalance(run),
        "kv_usage_peak": run.kv_usage_peak,
        "preemptions": run.num_preemptions,
        "steps": len(run.steps),
        "output_tokens": run.num_output_tokens,
        "finished_requests": len(run.e2es),
        "failed_requests": run.num_failed,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; zeros where there is nothing."""
    if not len(values):
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    array = np.asarray(values)
    p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
    return {"mean": float(array.mean()), "p50": p50, "p90": p90, "p99": p99}


def micro_batch_tokens(run: SimulationRun) -> dict[str, float]:
    """Between fill and drain; of all micro-batches where there was no such time."""
    loads = run.loads
    tokens = [step.num_tokens for step in run.steps if loads[step.load][0] <= step.began < loads[step.load][1]]
    tokens = tokens or [step.num_tokens for step in run.steps] or [0]
    return {"min": min(tokens), "mean": sum(tokens) / len(tokens), "max": max(tokens)}


def imbalance(run: SimulationRun) -> dict[str, float]:
    """Largest over smallest micro-batch of a revolution (as many as there are queues, one after the other), in tokens,
    after the first revolution of a load and before its drain; ones where there was none."""
    ratios: list[float] = []
    pushed = Counter[int]()
    settled: list[list[int]] = [[] for _ in run.loads]
    for step in run.steps:
        begin, end = run.loads[step.load]
        if pushed[step.load] >= run.num_queues and begin <= step.began < end:
            settled[step.load].append(step.num_tokens)
        pushed[step.load] += 1
    for tokens in settled:
        if run.num_queues > 1 and len(tokens) >= run.num_queues:
            windows = np.lib.stride_tricks.sliding_window_view(np.array(tokens, dtype=np.float64), run.num_queues)
            ratios += (windows.max(axis=1) / windows.min(axis=1)).tolist()
    return {**spread(ratios or [1.0]), "max": max(ratios, default=1.0)}
