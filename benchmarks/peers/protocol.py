"""What every contender's script does: read the arguments, warm up, measure, print one JSON line per workload.

    PYTHON -m benchmarks.peers.NAME --model DIR --workload W1 [W2 ...] --seed N [--threads 2]

The line holds ``workload``, ``model``, ``total_s``, ``output_throughput`` (tokens per second), ``ttft_ms`` and
``itl_ms`` (means over the requests), ``peak_rss_mb`` (MiB, the whole process tree) and ``versions``. Everything else
that is printed goes to stderr. Standard library only, since it runs in the peers' environments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TextIO

from benchmarks.workloads import WORKLOADS, make_prompts, measured_seed, warm_up_seed


@dataclass(frozen=True, slots=True)
class Run:
    """One workload run to its end. Times are seconds since the requests were submitted."""

    total_s: float
    first_token_s: Sequence[float]
    """Of each request."""
    last_token_s: Sequence[float]
    """Of each request."""
    output_tokens: Sequence[int]
    """Of each request."""


class Contender(Protocol):
    """An engine that is loaded and waits for work."""

    packages: tuple[str, ...]
    """Whose versions belong beside the figures."""

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        """Answer all prompts, submitted at once: greedily, ``output_tokens`` each whatever comes out."""


def parse_args() -> argparse.Namespace:
    """The arguments that all contenders share."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), required=True, help="what to run, in order")
    parser.add_argument("--seed", type=int, required=True, help="number of the repeat: chooses the prompts")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with (default: 2)")
    parser.add_argument("--kv-gib", type=int, default=1, help="GiB for the KV cache (default: 1)")
    parser.add_argument("--cache", type=Path, required=True, help="folder for converted checkpoints")
    return parser.parse_args()


def serve(load: Callable[[argparse.Namespace], Contender]) -> None:
    """Load the contender and measure it on the workloads asked for."""
    args = parse_args()
    out = claim_stdout()
    contender = load(args)
    for name in args.workload:
        workload = WORKLOADS[name]
        contender.run(make_prompts(workload, warm_up_seed(args.seed)), workload.output)
        run = contender.run(make_prompts(workload, measured_seed(args.seed)), workload.output)
        if list(run.output_tokens) != [workload.output] * workload.requests:
            raise RuntimeError(
                f"{name}: asked for {workload.requests} x {workload.output} tokens, got {run.output_tokens}"
            )
        write_line(out, args, name, figures(run), peak_rss_mb(), versions(contender.packages))


def write_line(
    out: TextIO,
    args: argparse.Namespace,
    workload: str,
    figures: dict[str, float],
    peak_rss: float,
    versions: dict[str, str],
) -> None:
    """Report one workload."""
    line = {"workload": workload, "model": args.model.name, **figures, "peak_rss_mb": peak_rss, "versions": versions}
    print(json.dumps(line), file=out, flush=True)


def figures(run: Run) -> dict[str, float]:
    """The figures of a run; latencies are means over its requests."""
    gaps = [
        (last - first) / (tokens - 1)
        for first, last, tokens in zip(run.first_token_s, run.last_token_s, run.output_tokens, strict=True)
        if tokens > 1
    ]
    return {
        "total_s": run.total_s,
        "output_throughput": sum(run.output_tokens) / run.total_s,
        "ttft_ms": 1e3 * statistics.fmean(run.first_token_s),
        "itl_ms": 1e3 * statistics.fmean(gaps) if gaps else 0.0,
    }


def claim_stdout() -> TextIO:
    """A stream to the real stdout; from here on whatever a library or its processes print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def use_threads(count: int) -> None:
    """Keep OpenMP libraries that are loaded after this to ``count`` threads."""
    os.environ["OMP_NUM_THREADS"] = str(count)


def cores(count: int) -> list[int]:
    """The first ``count`` cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))[:count]


def peak_rss_mb() -> float:
    """Peak resident MiB of this process and its descendants. Pages that they share are counted in each."""
    return sum(_peak_kib(pid) for pid in [os.getpid(), *_descendants(os.getpid())]) / 1024


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _peak_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def versions(packages: Sequence[str]) -> dict[str, Any]:
    """Installed versions, Python's own among them."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            print(f"{package} is not installed in {sys.prefix}", file=sys.stderr)
    return found
