"""``llm-engine trace``: what a step trace says of the pipeline, in tables, as JSON and as a picture."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

from ..core.errors import ConfigError
from ..core.trace import StepStats
from ..metrics.pipeline_report import PipelineReport, Spread, report
from ..metrics.step_trace import TraceFile, read_trace
from .outputs import check_outputs
from .tables import new_table

NARROWEST = 100
"""Columns that the tables need at most."""


def run(args: argparse.Namespace) -> int:
    """Print the tables, and write what was asked for; returns the exit code."""
    trace = read_trace(args.file)
    check_outputs({"json": args.json, "plot": args.plot}, {"trace": args.file})
    if not trace.records:
        raise ConfigError("trace", args.file, "a trace of at least one step")
    begin, end = _stretch(args, trace.records)
    found = report(trace.records, begin=begin, end=end)
    if not found.num_steps:
        raise ConfigError("from and to", _words_of(args), f"a stretch with steps, of {_length(trace.records):.3f} s")
    _print(trace, found)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(as_json(trace, found), file, indent=1)
            file.write("\n")
    if args.plot:
        from ..metrics.timeline import plot_timeline

        plot_timeline(trace.records, args.plot, title=_title(trace), begin=begin, end=end)
    return 0


def as_json(trace: TraceFile, found: PipelineReport) -> dict[str, object]:
    """The report with what was run."""
    about = trace.metadata
    return {
        "model": about.model,
        "scheduler": about.scheduler,
        "num_stages": about.num_stages,
        "num_queues": about.num_queues,
        "layers_per_stage": list(about.layers_per_stage),
        "version": about.version,
        "simulated": about.simulated,
        **found.as_json(),
    }


def _stretch(args: argparse.Namespace, records: list[StepStats]) -> tuple[float | None, float | None]:
    """(begin, end) on the records' clock; ``None`` for what was not said."""
    for name in ("last", "from", "to"):
        value = getattr(args, name)
        if value is not None and not (0.0 <= value < math.inf):
            raise ConfigError(name, value, "seconds, 0 or more")
    if args.last is not None:
        if getattr(args, "from") is not None or args.to is not None:
            raise ConfigError("last", args.last, "either last, or from and to")
        return records[-1].retired_at - args.last, records[-1].retired_at
    first = records[0].began_at
    begin, end = getattr(args, "from"), args.to
    return (None if begin is None else first + begin), (None if end is None else first + end)


def _length(records: list[StepStats]) -> float:
    return records[-1].retired_at - records[0].began_at


def _words_of(args: argparse.Namespace) -> str:
    if args.last is not None:
        return f"the last {args.last:g} s"
    begin, end = getattr(args, "from"), args.to
    return f"{begin or 0:g} to {'the end' if end is None else f'{end:g}'}"


def _title(trace: TraceFile) -> str:
    about = trace.metadata
    layers = f" ({'+'.join(map(str, about.layers_per_stage))} layers)" if about.layers_per_stage else ""
    stages = "1 stage" if about.num_stages == 1 else f"{about.num_stages} stages"
    simulated = ", simulated" if about.simulated else ""
    return f"{about.model}, {stages}{layers}, scheduler {about.scheduler}{simulated}"


def _print(trace: TraceFile, found: PipelineReport) -> None:
    from rich.console import Console, Group

    steps = f"{found.num_steps} steps"
    if found.num_failed:
        steps += f", {found.num_failed} failed"
    if found.num_ahead:
        steps += f", {found.num_ahead} pushed ahead"
    loads = "1 load" if found.num_loads == 1 else f"{found.num_loads} loads"
    about = f"{steps}, {found.num_tokens} tokens, {loads} of {found.seconds:.3f} s in all"
    full = f"{found.full_seconds:.3f} s of it between fill and drain"
    tables = (_stages(found), _pipeline(found), _parts(found))
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, NARROWEST)  # cut figures would be worse than wrapped lines
    console.print(Group(_title(trace), f"{about}, {full}", *tables))


def _table(title: str, *columns: str) -> Any:
    return new_table(*columns, title=title, title_justify="left")


def _stages(found: PipelineReport) -> Any:
    table = _table("Stages", "stage", "busy", "busy s", "bubble s", "gap p50", "gap p99", "gap/step", "hop p50")
    for index, stage in enumerate(found.stages):
        hop, gap = found.hops[index], stage.gap
        table.add_row(
            str(index),
            _percent(stage.busy_ratio),
            f"{stage.busy_seconds:.3f}",
            f"{stage.bubble_seconds:.3f}",
            _time(gap.p50 if gap else None),
            _time(gap.p99 if gap else None),
            _percent(stage.gap_ratio),
            _time(hop.p50 if hop else None),
        )
    return table


def _pipeline(found: PipelineReport) -> Any:
    table = _table("Pipeline", "", "n", "min", "mean", "p50", "p99", "max")
    _row(table, "micro-batch tokens", found.micro_batch_tokens, _number)
    _row(table, f"imbalance of {len(found.stages)}, max/min", found.max_over_min, _ratio)
    _row(table, f"imbalance of {len(found.stages)}, max/mean", found.max_over_mean, _ratio)
    if found.in_flight_mean is not None:
        table.add_row("in flight", "", "", _ratio(found.in_flight_mean), "", "", str(found.in_flight_max))
    _row(table, "between steps", found.between_steps, _time)
    _row(table, "host overhead", found.host_overhead, _time)
    if found.bubble_fraction is not None:
        table.add_row("bubble fraction", "", "", _percent(found.bubble_fraction), "", "", "")
    return table


def _parts(found: PipelineReport) -> Any:
    table = _table("A step's time by part", "", "n", "min", "mean", "p50", "p99", "max")
    for name, spread in found.parts.items():
        _row(table, name, spread, _time)
    return table


def _row(table: Any, name: str, spread: Spread | None, text: Callable[[float | None], str]) -> None:
    if spread is not None:
        values = (spread.min, spread.mean, spread.p50, spread.p99, spread.max)
        table.add_row(name, str(spread.count), *map(text, values))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 0.9995e-3:
        return f"{1e6 * seconds:.0f} µs"
    value, unit = (1e3 * seconds, "ms") if seconds < 0.9995 else (seconds, "s")
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100.0 * ratio:.1f} %"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
