"""``llm-engine bench offline``: the offline workloads, greedy, end of sequence ignored, prompts of random ids.

    W1  64 requests of 128 in, 128 out, all at once      output tokens per second
    W2  1 request of 128 in, 128 out                     time to first token, mean inter-token latency
    W3  16 requests of 1024 in, 16 out, all at once      seconds
    W4  32 requests, 768 shared + 32 own in, 32 out      seconds, the prefix cache cold at the start

Each repeat has prompts of its own, from ``--seed`` on, so no repeat finds another one's blocks in the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError
from ..core.outputs import RequestOutput
from ..core.sampling_params import SamplingParams
from ..core.version import __version__
from .settings import ENGINE_SETTINGS, resolve

if TYPE_CHECKING:
    from ..engine.llm import LLM

LOWEST_ID, HIGHEST_ID = 100, 31_000


@dataclass(frozen=True, slots=True)
class Workload:
    """How many requests of how many tokens."""

    requests: int
    shared: int
    """Leading prompt tokens that all requests of a repeat have in common."""
    own: int
    output: int


WORKLOADS = {
    "W1": Workload(64, 0, 128, 128),
    "W2": Workload(1, 0, 128, 128),
    "W3": Workload(16, 0, 1024, 16),
    "W4": Workload(32, 768, 32, 32),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """One repeat's figures; latencies are means over the requests."""

    total_s: float
    output_throughput: float
    """Output tokens per second."""
    ttft_ms: float
    itl_ms: float


def run(args: argparse.Namespace) -> int:
    """Run the workload and print its figures; returns the exit code."""
    settings = resolve(ENGINE_SETTINGS, args)
    for name in ("requests", "repeat"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(name, getattr(args, name), "a whole number of 1 or more")
    workload = WORKLOADS[args.workload]
    requests = args.requests or workload.requests

    from ..engine.llm import LLM

    runs: list[Figures] = []
    with LLM(**settings, show_progress=sys.stderr.isatty()) as llm:
        highest = min(HIGHEST_ID, llm.engine.info.model.vocab_size)
        measure(llm, make_prompts(workload, min(requests, 2), highest, seed=-1), 4)  # warms up
        for repeat in range(args.repeat):
            prompts = make_prompts(workload, requests, highest, settings.get("seed", 0) + repeat)
            runs.append(measure(llm, prompts, workload.output))
            print(f"{args.workload} run {repeat + 1}: {_in_words(runs[-1])}", file=sys.stderr, flush=True)
        report = make_report(args.workload, llm.model_name, requests, runs)
    print(f"{args.workload} {report['model']}: {_in_words(best(runs))}, peak {report['peak_rss_mb']:.0f} MB")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return 0


def make_prompts(workload: Workload, requests: int, highest_id: int, seed: int) -> list[list[int]]:
    """Prompts of random ids from ``[100, highest_id)``, the same for the same seed."""
    source = random.Random(f"{workload} {seed}")
    lowest = min(LOWEST_ID, highest_id - 1)

    def ids(count: int) -> list[int]:
        return [source.randrange(lowest, highest_id) for _ in range(count)]

    shared = ids(workload.shared)
    return [shared + ids(workload.own) for _ in range(requests)]


def measure(llm: LLM, prompts: list[list[int]], output_tokens: int) -> Figures:
    """Submit all prompts at once and wait for the last answer."""
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    total = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    gaps = [gap for output in outputs if (gap := _inter_token(output)) is not None]
    return Figures(
        total_s=total,
        output_throughput=tokens / total,
        ttft_ms=1e3 * statistics.fmean(_ttft(output) for output in outputs),
        itl_ms=1e3 * statistics.fmean(gaps) if gaps else 0.0,
    )


def _ttft(output: RequestOutput) -> float:
    assert output.metrics.first_token is not None
    return output.metrics.first_token - output.metrics.arrival


def _inter_token(output: RequestOutput) -> float | None:
    metrics, tokens = output.metrics, len(output.outputs[0].token_ids)
    assert metrics.first_token is not None
    assert metrics.last_token is not None
    return (metrics.last_token - metrics.first_token) / (tokens - 1) if tokens > 1 else None


def best(runs: list[Figures]) -> Figures:
    """The run that took the least time."""
    return min(runs, key=lambda run: run.total_s)


def make_report(workload: str, model: str, requests: int, runs: list[Figures]) -> dict[str, Any]:
    """The JSON report: the best run's figures, and every run's."""
    return {
        "workload": workload,
        "model": model,
        "requests": requests,
        **asdict(best(runs)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": _versions(),
        "runs": [asdict(figures) for figures in runs],
    }


def _versions() -> dict[str, str]:
    versions = {"llm-engine": __version__, "python": platform.python_version()}
    for package in ("torch", "xformers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _in_words(figures: Figures) -> str:
    return (
        f"{figures.total_s:.3f} s, {figures.output_throughput:.0f} output tok/s, "
        f"TTFT {figures.ttft_ms:.1f} ms, inter-token {figures.itl_ms:.2f} ms"
    )
