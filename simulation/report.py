"""The figures of a run, as they go into the table and the JSON file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.percentiles import nearest_rank
from ..metrics.request_groups import ANONYMOUS
from .contention import fairness
from .run import Served, SimulationRun


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good answer is, in seconds. A request that has a deadline is judged by that alone."""

    ttft: float | None = None
    mean_itl: float | None = None

    def met_by(self, served: Served) -> bool:
        """Whether it finished, and in time."""
        if not served.finished:
            return False
        if served.deadline is not None:
            return served.last_token_at <= served.deadline
        return all(
            limit is None or value is None or value <= limit
            for limit, value in ((self.ttft, served.ttft), (self.mean_itl, served.mean_itl))
        )


def figures(run: SimulationRun, slo: Slo | None = None) -> dict[str, Any]:
    """The JSON keys of ``llm-engine simulate``: seconds, tokens and shares; docs/simulation.md says what each is."""
    elapsed = run.makespan or 1.0  # nothing was served: zeros
    full_seconds = run.full_seconds
    num_good = sum(map((slo or Slo()).met_by, run.requests))
    return {
        "makespan_s": run.makespan,
        "output_throughput": run.num_output_tokens / elapsed,
        "request_throughput": len(run.e2es) / elapsed,
        "ttft_s": spread(run.ttfts),
        "itl_s": spread(run.itls),
        "e2e_s": spread(run.e2es),
        "good_requests": num_good,
        "goodput": num_good / elapsed,
        "good_share": num_good / max(len(run.requests), 1),
        "fairness": fairness(run.requests, run.tenant_tokens),
        "contended_s": run.contended_until,
        "prefix_hit_rate": run.prefix_hits / max(run.prefix_queries, 1),
        "stage_busy": run.stage_busy if full_seconds else [None] * len(run.stage_busy),
        "stage_busy_overall": [seconds / elapsed for seconds in run.busy_seconds],
        "bubble_fraction": 1.0 - sum(run.stage_busy) / len(run.stage_busy) if full_seconds else None,
        "full_s": full_seconds,
        "micro_batch_tokens": micro_batch_tokens(run),
        "imbalance": imbalance(run),
        "kv_usage_peak": run.kv_usage_peak,
        "kv_usage_mean": run.kv_usage_mean,
        "preemptions": run.num_preemptions,
        "recomputed_tokens": recomputed_tokens(run),
        "steps": len(run.steps),
        "output_tokens": run.num_output_tokens,
        "finished_requests": len(run.e2es),
        "shed_requests": sum(served.shed for served in run.requests),
        "failed_requests": run.num_failed,
        "tenants": _by_group(run, lambda served: ANONYMOUS if served.tenant is None else served.tenant),
        "priorities": _by_group(run, lambda served: str(served.priority)),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles by nearest rank; zeros where there is nothing."""
    if not len(values):
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    ranked: list[float] = np.sort(np.asarray(values, dtype=np.float64)).tolist()
    mean = math.fsum(ranked) / len(ranked)
    return {"mean": mean, **{f"p{percent}": nearest_rank(ranked, percent) for percent in (50, 90, 99)}}


def recomputed_tokens(run: SimulationRun) -> int:
    """Tokens computed beyond what the answers took: once more after a pause, or for a request that was given up."""
    computed = sum(step.num_tokens for step in run.steps)
    # The last token of an answer is sampled and never computed.
    needed = sum(
        served.num_prompt_tokens - served.num_cached_tokens + served.num_output_tokens - 1
        for served in run.requests
        if served.finished
    )
    return max(computed - needed, 0)


def _by_group(run: SimulationRun, key: Callable[[Served], str]) -> dict[str, Any]:
    """Times to first token of each tenant or priority; nothing where all are alike."""
    groups: dict[str, list[Served]] = {}
    for served in run.requests:
        groups.setdefault(key(served), []).append(served)
    if len(groups) < 2:
        return {}
    return {
        name: {
            "requests": len(members),
            "finished": sum(served.finished for served in members),
            "ttft_s": spread([served.ttft for served in members if served.ttft is not None]),
        }
        for name, members in sorted(groups.items())
    }


def micro_batch_tokens(run: SimulationRun) -> dict[str, float]:
    """Between fill and drain; of all micro-batches where there was no such time."""
    loads = run.loads
    tokens = [step.num_tokens for step in run.steps if loads[step.load][0] <= step.began < loads[step.load][1]]
    tokens = tokens or [step.num_tokens for step in run.steps] or [0]
    return {"min": min(tokens), "mean": sum(tokens) / len(tokens), "max": max(tokens)}


def imbalance(run: SimulationRun) -> dict[str, float]:
    """Largest over smallest micro-batch of a revolution (as many as there are stages, one after the other), in tokens,
    after the first revolution of a load and before its drain; ones where there was none."""
    size = len(run.stage_busy)
    ratios: list[float] = []
    pushed = Counter[int]()
    settled: list[list[int]] = [[] for _ in run.loads]
    for step in run.steps:
        begin, end = run.loads[step.load]
        if pushed[step.load] >= size and begin <= step.began < end:
            settled[step.load].append(step.num_tokens)
        pushed[step.load] += 1
    for tokens in settled:
        if 1 < size <= len(tokens):
            windows = np.lib.stride_tricks.sliding_window_view(np.array(tokens, dtype=np.float64), size)
            ratios += (windows.max(axis=1) / windows.min(axis=1)).tolist()
    return {**spread(ratios or [1.0]), "max": max(ratios, default=1.0)}
