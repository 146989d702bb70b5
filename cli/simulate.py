"""``llm-engine simulate``: a workload through a pipeline on a virtual clock; as a table, JSON, a picture, a trace."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ..core.config import CacheConfig, EngineConfig, SchedulerConfig
from ..core.errors import CapacityError
from ..simulation.config import LOAD_SETTINGS, SimulationConfig
from .outputs import check_outputs
from .settings import ENGINE_SETTINGS, SIMULATION_SETTINGS, resolve
from .tables import new_table

if TYPE_CHECKING:
    from ..simulation.run import SimulationRun
    from ..simulation.setup import Setup

ENGINE_NAMES = (
    *(field.name for field in fields(SchedulerConfig)),
    *(field.name for field in fields(CacheConfig) if field.name != "kv_cache_memory"),
    "pipeline_layer_partition",
    "dtype",
    "max_model_len",
    "seed",
    "trace",
    "trace_steps",
)
"""Settings of an engine that mean the same here."""
MOST_SPANS = 2_000_000
"""Stage times that a trace or a picture is made of at most: a thousand stages would fill the memory."""


def run(args: argparse.Namespace) -> int:
    """Simulate, print the table, and write what was asked for; returns the exit code."""
    wanted = {**SIMULATION_SETTINGS, **{name: ENGINE_SETTINGS[name] for name in ENGINE_NAMES}}
    values = resolve(wanted, args)
    simulation = SimulationConfig(**{name: values.pop(name) for name in SIMULATION_SETTINGS if name in values})

    from ..metrics.step_trace import write_trace
    from ..simulation.report import figures
    from ..simulation.setup import DEFAULT_STAGES, set_up

    stages = simulation.stages or DEFAULT_STAGES
    if simulation.stages is None and simulation.fit is not None:
        # How many the trace has shows once it is read; a partition is held against that then.
        stages = (values.get("pipeline_layer_partition") or "").count(",") + 1
    engine = EngineConfig.of(**values, pipeline_parallel_size=stages)

    trace = engine.observability.trace
    written = {"trace": trace, "json": args.json, "plot": args.plot}
    check_outputs(written, {"fit": simulation.fit, "workload": simulation.workload})
    if args.compare is not None:
        from .compare import run_comparison

        return run_comparison(simulation, engine, args.compare, json_path=args.json, plot_path=args.plot)
    setup = set_up(simulation, engine)
    kept = 0
    if trace is not None or args.plot is not None:
        kept = max(min(engine.observability.trace_steps, MOST_SPANS // len(setup.split)), 1)
    with progress(len(setup.arrivals)) as on_finished:
        found = setup.simulator(keep_stats=kept, on_finished=on_finished).run(setup.arrivals)
    if not found.e2es:
        raise CapacityError(f"nobody could be served: {found.failure}")
    report = {**figures(found, setup.slo), "settings": settings_of(setup, found)}
    _print(setup, report, found.failure)
    if args.json is not None:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    if trace is not None:
        write_trace(trace, _metadata(setup, found), found.stats)
    if args.plot is not None:
        from ..metrics.timeline import plot_timeline

        plot_timeline(found.stats, args.plot, title=_title(setup))
    return 0


def settings_of(setup: Setup, run: SimulationRun) -> dict[str, Any]:
    """Everything the figures depend on, defaults resolved."""
    from ..simulation.entries import resolved_names
    from ..simulation.fitted import ANY_LENGTH

    engine = setup.engine
    said = {
        name: getattr(part, name)
        for part in (engine.scheduler, engine.cache, engine.model, engine.parallel)
        for name in (field.name for field in fields(part))
        if name in ENGINE_NAMES
    }
    link, host = setup.link, setup.host
    resolved = {
        **resolved_names(engine.scheduler, len(setup.split)),
        "model_shape": setup.model,
        "num_layers": sum(setup.split),
        "stages": len(setup.split),
        "hardware": setup.hardware,
        "dtype": setup.dtype,
        "max_model_len": setup.max_model_len if setup.max_model_len < ANY_LENGTH else None,
        "rate": str(setup.simulation.rate) if math.isinf(setup.simulation.rate) else setup.simulation.rate,
        "requests": len(setup.arrivals),
        "layers_per_stage": list(setup.split),
        "num_queues": run.num_queues,
        "num_kv_blocks": setup.num_kv_blocks,
        "block_size": setup.block_size,
        "sliding_window": setup.sliding_window,
        "link": setup.link_name,
        "link_latency_us": 1e6 * link.latency,
        "link_gbit": None if math.isinf(link.bandwidth) else 8e-9 * link.bandwidth,
        "host_overhead_us": 1e6 * (host.push + host.retire),
        "host_push_us": 1e6 * host.push,
        "host_retire_us": 1e6 * host.retire,
        "slo_ttft_ms": None if setup.slo.ttft is None else 1e3 * setup.slo.ttft,
        "slo_itl_ms": None if setup.slo.mean_itl is None else 1e3 * setup.slo.mean_itl,
        **asdict(setup.limits),
    }
    if setup.simulation.workload is not None:
        resolved |= dict.fromkeys(name for name in LOAD_SETTINGS if name != "requests")
    return {**asdict(setup.simulation), **said, **resolved}


@contextmanager
def progress(total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, once it takes longer than a moment; without a total, of runs one after the other."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="Simulating", total=total, unit="request", delay=1.0, dynamic_ncols=True, leave=False) as bar:
        before = last = 0

        def on_finished(ended: int) -> None:
            nonlocal before, last
            if ended < last:
                before += last
            last = ended
            bar.update(before + ended - bar.n)

        yield on_finished


def _metadata(setup: Setup, run: SimulationRun) -> Any:
    from ..core.version import __version__
    from ..metrics.step_trace import TraceMetadata

    return TraceMetadata(
        version=__version__,
        model=setup.model,
        scheduler=_scheduler(setup),
        num_stages=len(setup.split),
        num_queues=run.num_queues,
        layers_per_stage=setup.split,
        limits=asdict(setup.limits),
        num_kv_blocks=setup.num_kv_blocks,
        block_size=setup.block_size,
        on_cuda=setup.on_cuda,
        sliding_window=setup.sliding_window,
        max_model_len=setup.max_model_len,
        simulated=True,
    )


def _title(setup: Setup) -> str:
    stages = "1 stage" if len(setup.split) == 1 else f"{len(setup.split)} stages"
    return f"{setup.model}, {stages}, {setup.stages_are}, scheduler {_scheduler(setup)}, simulated"


def _scheduler(setup: Setup) -> str:
    """Its name or, where the preset is not all of it, those of its parts."""
    from ..simulation.entries import resolved_names

    config = setup.engine.scheduler
    names = resolved_names(config, len(setup.split))
    if config.ordering is None and config.capacity is None and config.micro_batch is None:
        return str(names["scheduler"])
    return " x ".join(str(names[part]) for part in ("ordering", "capacity", "micro_batch"))


def _print(setup: Setup, report: dict[str, Any], failure: str | None) -> None:
    from rich.console import Console, Group

    whole = new_table("", "")
    for name, text in _rows(setup, report):
        whole.add_row(name, text)
    latencies = new_table("seconds", "mean", "p50", "p90", "p99")
    for name, key in (("time to first token", "ttft_s"), ("inter-token", "itl_s"), ("end to end", "e2e_s")):
        latencies.add_row(name, *(f"{report[key][column]:.4g}" for column in ("mean", "p50", "p90", "p99")))
    parts: list[Any] = [_title(setup), latencies, whole]
    if failure is not None:
        parts.append(f"{report['failed_requests']} requests failed; the first: {failure}")
    Console(soft_wrap=True, highlight=False).print(Group(*parts))


def _rows(setup: Setup, report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    tokens, uneven, busy, bubbles = (
        report[key] for key in ("micro_batch_tokens", "imbalance", "stage_busy", "bubble_fraction")
    )
    shown = "-"  # too short to fill the pipeline
    if report["full_s"] and len(busy) > 8:
        shown = f"{100 * min(busy):.1f} to {100 * max(busy):.1f}, mean {100 * sum(busy) / len(busy):.1f} %"
    elif report["full_s"]:
        shown = f"{', '.join(f'{100 * ratio:.1f}' for ratio in busy)} %"
    usable = (setup.num_kv_blocks - 1) * setup.block_size
    yield "makespan", f"{report['makespan_s']:.4g} s"
    yield "output throughput", f"{report['output_throughput']:.1f} tokens/s"
    yield "request throughput", f"{report['request_throughput']:.3g} /s"
    yield "stages busy between fill and drain", shown
    yield "bubble fraction", "-" if bubbles is None else f"{100 * bubbles:.1f} %"
    yield "micro-batch tokens, min / mean / max", f"{tokens['min']} / {tokens['mean']:.1f} / {tokens['max']}"
    yield f"imbalance of {len(busy)} in a row, p50 / max", f"{uneven['p50']:.2f} / {uneven['max']:.2f}"
    yield "KV use, peak", f"{100 * report['kv_usage_peak']:.1f} % of {usable} tokens"
    yield "preemptions", str(report["preemptions"])
