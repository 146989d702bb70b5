"""The figures of a run, as they go into the table and the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .simulator import SimulationRun


def figures(run: SimulationRun) -> dict[str, Any]:
    """The JSON keys of ``llm-engine simulate``; seconds, tokens and shares."""
    makespan = run.makespan or float("nan")
    finished = len(run.e2es)
    return {
        "makespan_s": run.makespan,
        "output_throughput": run.num_output_tokens / makespan if run.makespan else 0.0,
        "request_throughput": finished / makespan if run.makespan else 0.0,
        "ttft_s": spread(run.ttfts),
        "itl_s": spread(run.itls),
        "e2e_s": spread(run.e2es),
        "stage_busy": run.steady_busy,
        "stage_busy_overall": [seconds / makespan if run.makespan else 0.0 for seconds in run.busy_seconds],
        "bubble_fraction": 1.0 - sum(run.steady_busy) / len(run.steady_busy) if run.steady_busy else 0.0,
        "micro_batch_tokens": micro_batch_tokens(run),
        "kv_usage_peak": run.kv_usage_peak,
        "preemptions": run.num_preemptions,
        "steps": len(run.steps),
        "output_tokens": run.num_output_tokens,
        "finished_requests": finished,
        "failed_requests": run.num_failed,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; zeros where there is nothing."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    array = np.asarray(values)
    p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
    return {"mean": float(array.mean()), "p50": p50, "p90": p90, "p99": p99}


def micro_batch_tokens(run: SimulationRun) -> dict[str, float]:
    """Of the micro-batches that began and ended between fill and drain; of all where there was no such time."""
    steady = [s.num_tokens for s in run.steps if s.began >= run.filled_at and s.ended <= run.drained_at]
    tokens = steady or [step.num_tokens for step in run.steps] or [0]
    return {"min": min(tokens), "mean": sum(tokens) / len(tokens), "max": max(tokens)}
