"""How fast a pipeline's slowest stage is for each split of the layers: measured, and as the automatic split expects.

    python -m benchmarks.layer_split --model bench-models/tiny bench-models/small

One process on one core times every stage by itself. Of two stages every split is measured, of more the named ones. The
best column can be given to the engine as it stands: ``--pipeline-layer-partition 7,5``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.stage_times import STEPS, measure
from llm_engine.core.stage_settings import SPLIT_NAMES
from llm_engine.models.architectures import model_spec
from llm_engine.models.config import read_config
from llm_engine.models.layer_cost import SPEEDS, DeviceSpeed, layer_times
from llm_engine.models.layer_split import stage_times
from llm_engine.models.spec import ModelSpec
from llm_engine.models.stages import choose_split

NOISE = 0.03
"""Stage times of one machine agree within this much from one round to the next."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where the automatic split is slower than the even one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="DIR", help="checkpoints")
    parser.add_argument("--stages", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--rounds", type=int, default=2, help="times each stage is loaded and timed (default: 2)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="CPU to run on")
    parser.add_argument("--fit", action="store_true", help="print the speeds that meet the times best")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine.describe(), "models": {}}
    os.sched_setaffinity(0, {args.core})
    others = machine.OtherWork()
    console = Console(width=None if sys.stdout.isatty() else 140)
    specs = {}
    for model in args.model:
        config, name = read_config(model), model.resolve().name
        specs[name] = model_spec(config)
        splits = candidates(specs[name], args.stages, itemsize := 4 if config.dtype == "float32" else 2)
        stages = measure_all(model, specs[name], splits, args.rounds, console)
        result["models"][name] = {"splits": splits, "itemsize": itemsize, "stages": stages}
    # This process's own time counts as other work there: it keeps one core busy throughout.
    result["other_cores"] = max(others.cores() - 1.0, 0.0)
    worse = [line for name, spec in specs.items() for line in show(name, spec, result["models"][name], console)]
    console.print(f"other work meanwhile: {result['other_cores']:.2f} cores")
    if args.fit:
        console.print(fit(specs, result["models"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in worse:
        console.print(line)
    return 1 if worse else 0


def candidates(spec: ModelSpec, num_stages: int, itemsize: int) -> list[list[int]]:
    """Every split of two stages, the named ones of more."""
    if num_stages == 2:
        return [[first, spec.num_layers - first] for first in range(1, spec.num_layers)]
    named = {tuple(choose_split(spec, num_stages, name, itemsize=itemsize)) for name in SPLIT_NAMES}
    return [list(split) for split in sorted(named, reverse=True)]


def measure_all(
    model: Path, spec: ModelSpec, splits: list[list[int]], rounds: int, console: Console
) -> dict[str, dict[str, float]]:
    """Least seconds by step of each stage that a split has, by its layers as ``start-end``, and of the whole."""
    jobs = {name: (split, stage) for split in splits for stage, name in enumerate(names(split))}
    jobs[f"0-{spec.num_layers}"] = ([spec.num_layers], 0)
    found: dict[str, dict[str, float]] = {}
    for number in range(rounds):
        for name, (split, stage) in jobs.items():
            console.print(f"{model.name}: layers {name}, round {number + 1} of {rounds}", style="dim")
            times = measure(model, spec, split, stage)
            before = found.get(name, {})
            found[name] = {step: min(seconds, before.get(step, math.inf)) for step, seconds in times.items()}
    return found


def names(split: Sequence[int]) -> list[str]:
    """``start-end`` of each stage."""
    ends = list(accumulate(split))
    return [f"{end - count}-{end}" for count, end in zip(split, ends, strict=True)]


def show(name: str, spec: ModelSpec, measured: dict[str, Any], console: Console) -> Iterator[str]:
    """Print the table; a line for each step in which the automatic split loses to the even one."""
    splits, itemsize, stages = measured["splits"], measured["itemsize"], measured["stages"]
    num_stages = len(splits[0])
    called: dict[tuple[int, ...], list[str]] = {}
    for label in SPLIT_NAMES:
        called.setdefault(tuple(choose_split(spec, num_stages, label, itemsize=itemsize)), []).append(label)
    table = Table(title=f"{name}: ms of the slowest stage, and how many times as fast as one stage")
    for heading in ("layers", "named", *(step.name for step in STEPS)):
        table.add_column(heading, justify="left" if heading == "named" else "right")
    errors: list[float] = []
    slowest = {
        tuple(split): {step.name: max(stages[part][step.name] for part in names(split)) for step in STEPS}
        for split in splits
    }
    for split, times in slowest.items():
        cells = []
        for step in STEPS:
            estimate = max(stage_times(layer_times(spec, step.shape, SPEEDS["cpu"], itemsize), split))
            errors.append(abs(estimate / times[step.name] - 1))
            seconds, whole = times[step.name], stages[f"0-{spec.num_layers}"][step.name]
            best = seconds == min(other[step.name] for other in slowest.values())
            cell = f"{seconds * 1e3:.2f}  x{whole / seconds:.2f}"
            cells.append(f"[bold]{cell} *[/bold]" if best else cell)
        table.add_row(",".join(map(str, split)), ", ".join(called.get(split, [])), *cells)
    console.print(table)
    console.print(f"estimates are off by {statistics.median(errors):.0%} in the median, {max(errors):.0%} at most")
    auto, even = (
        slowest[tuple(choose_split(spec, num_stages, label, itemsize=itemsize))] for label in ("auto", "even")
    )
    for step in STEPS:
        if auto[step.name] > even[step.name] * (1 + NOISE):
            yield f"{name}, {step.name}: the automatic split takes {auto[step.name] / even[step.name]:.2f} of the even"


def fit(specs: dict[str, ModelSpec], models: dict[str, Any]) -> str:
    """The ``DeviceSpeed`` that meets the times best in relative error, by least squares over its inverse rates.

    The estimate is linear in these: a column is the estimate by a device at which all else is for nothing.
    """
    parts = [field.name for field in fields(DeviceSpeed) if field.name != "overlaps"]
    nothing = DeviceSpeed(**{part: 0.0 if part.endswith("seconds") else math.inf for part in parts})
    rows: list[list[float]] = []
    for name, model in models.items():
        for layers, times in model["stages"].items():
            start, end = map(int, layers.split("-"))
            for step in STEPS:
                row = []
                for part in parts:
                    costs = layer_times(specs[name], step.shape, replace(nothing, **{part: 1.0}), model["itemsize"])
                    seconds = sum(costs.layers[start:end]) + costs.embedding * (start == 0)
                    row.append(seconds + costs.head * (end == len(costs.layers)))
                # Beside the speeds, what each step of a stage costs whatever it holds.
                rows.append([value / times[step.name] for value in [*row, 1.0]])
    matrix = np.array(rows)
    kept = list(range(matrix.shape[1]))
    while True:  # a rate that noise makes negative is left out
        scale = np.abs(matrix[:, kept]).max(axis=0)
        solution = np.linalg.lstsq(matrix[:, kept] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if solution.min() >= 0:
            break
        kept.pop(int(solution.argmin()))
    inverse = dict.fromkeys([*parts, "step"], 0.0) | {
        [*parts, "step"][i]: v for i, v in zip(kept, solution, strict=True)
    }
    speeds = {part: 1 / inverse[part] if inverse[part] else math.inf for part in parts}
    lines = [f"    {part}={inverse[part] if part.endswith('seconds') else speeds[part]:.3g}," for part in parts]
    spread = float(np.std(matrix[:, kept] @ solution))
    head = (
        f"{len(rows)} times, met within {spread:.1%} (standard deviation); {inverse['step'] * 1e6:.0f} us a step beside"
    )
    return "\n".join([head, "DeviceSpeed(", *lines, ")"])


if __name__ == "__main__":
    sys.exit(main())
