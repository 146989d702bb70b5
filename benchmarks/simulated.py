"""Simulation against reality: fitted to one run, it predicts the others; makespan and mean time to first token.

    python -m benchmarks.simulated --model DIR

Every run is an engine in a process of its own with a small warm-up, then the mix, all requests at once or as a stream.
The first run is traced and fitted; the others are only measured, and then simulated. In turn, round after round, so
that each prediction is made from a trace that is minutes old at most. A run waits until the machine is quiet, and is
made again if it did not stay so. The table goes to the terminal and to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.children import ROOT, ChildError, json_lines
from benchmarks.report import Spread, markdown_table
from llm_engine.core.config import EngineConfig
from llm_engine.core.cost_model import StepShape
from llm_engine.metrics.step_trace import read_trace
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.fitted import read_fit
from llm_engine.simulation.setup import Setup, set_up
from llm_engine.simulation.workload import Arrival, lognormal, poisson, prompt

POOL = 1 << 30
"""Bytes for the cache of each stage."""
LONGEST_WAIT = 600.0
"""Seconds for the machine to become quiet; then it is measured as it is."""


@dataclass(frozen=True, slots=True)
class Run:
    """One engine and one mix."""

    name: str
    stages: int
    requests: int
    input_len: int
    output_len: int
    sigma: float = 0.0
    """Of the lengths' logarithms; 0: all alike."""
    rate: float = math.inf
    settings: dict[str, Any] = field(default_factory=dict)

    def arrivals(self, seed: int) -> list[tuple[float, int, int]]:
        """(seconds, prompt tokens, answer tokens) of each request."""
        rng = random.Random(f"{self.name} {seed}")
        times = poisson(self.requests, self.rate, rng)
        if not self.sigma:
            return [(at, self.input_len, self.output_len) for at in times]
        return [
            (at, min(lognormal(self.input_len, self.sigma, rng), 2000), lognormal(self.output_len, self.sigma, rng))
            for at in times
        ]


TRACED = Run("2 stages, mixed", 2, 64, 150, 48, sigma=0.7)
PREDICTED = [
    Run("2 stages, long answers", 2, 64, 32, 96),
    Run("2 stages, long prompts", 2, 32, 512, 8),
    Run("2 stages, a stream of requests", 2, 48, 128, 32, sigma=0.5, rate=2.0),
    Run("2 stages, greedy", 2, 64, 128, 48, settings={"scheduler": "greedy"}),
    Run("1 stage, mixed", 1, 48, 150, 48, sigma=0.7),
    Run("1 stage, long answers", 1, 48, 32, 64),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, predict, print, write; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint `small`")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--only", nargs="+", help="only runs whose names contain one of these")
    parser.add_argument("--scheduler", default="balanced", help="(default: balanced)")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may keep busy (default: 0.1)")
    parser.add_argument("--tries", type=int, default=5, help="of a run that was disturbed (default: 5)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one run (default: 300)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    args = parser.parse_args(argv)
    asked = [run for run in PREDICTED if not args.only or any(word in run.name for word in args.only)]
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "model": args.model.name,
        "scheduler": args.scheduler,
        "rounds": args.rounds,
        "traced": asdict(TRACED),
        "runs": [],
    }
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            fitted, own = str(Path(folder) / f"{number}.json"), str(Path(folder) / "own.json")
            try:
                measured = _measure(args, TRACED, number, fitted)
                _note(result, args, TRACED, number, fitted, fitted, measured)
                for run in asked:
                    _note(result, args, run, number, fitted, own, _measure(args, run, number, own))
            except ChildError as error:
                print(f"a run failed: {error}", file=sys.stderr, flush=True)
                failed = True
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "simulated"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    page = markdown(result)
    target.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return int(failed)


def engine_settings(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """A stage process of one thread on each core; one stage on the first."""
    cores = ";".join(str(stage % 2) for stage in range(run.stages))
    return {
        "executor": "zmq",
        "pipeline_parallel_size": run.stages,
        "stage_cpus": cores,
        "cpu_threads": 1,
        "scheduler": args.scheduler,
        "enable_prefix_caching": False,
        **run.settings,
    }


def _measure(args: argparse.Namespace, run: Run, number: int, trace: str) -> dict[str, Any]:
    settings = {"model": str(args.model.resolve()), "dtype": "bfloat16", "kv_cache_memory": POOL}
    task = {
        "settings": settings | engine_settings(args, run),
        "arrivals": run.arrivals(number),
        "seed": number,
        "trace": trace,
    }
    command = [sys.executable, "-m", "benchmarks.simulated_turn", json.dumps(task)]
    for _ in range(args.tries):
        _wait_for_quiet(args.quiet)
        others = machine.OtherWork()
        (line,) = json_lines(command, args.timeout)
        line["other_cores"] = others.cores()
        if line["other_cores"] <= args.quiet:
            break
        print(f"{run.name}: others kept {line['other_cores']:.2f} cores busy", file=sys.stderr, flush=True)
    return line


def _wait_for_quiet(most: float) -> None:
    """Until others keep fewer cores busy for a few seconds; ten minutes at most."""
    end = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end:
        others = machine.OtherWork()
        time.sleep(4.0)
        if others.cores() <= most:
            return


def predict(args: argparse.Namespace, run: Run, number: int, trace: str) -> tuple[Setup, dict[str, float]]:
    """The same requests on the virtual clock, stages as in the trace."""
    kept = {"scheduler", "enable_prefix_caching", "max_num_batched_tokens", "schedule_ahead", "num_queues"}
    settings = {name: value for name, value in engine_settings(args, run).items() if name in kept}
    arrivals = [Arrival(at, prompt(i, n), m) for i, (at, n, m) in enumerate(run.arrivals(number))]
    setup = set_up(
        SimulationConfig(fit=trace, stages=run.stages),
        EngineConfig.of(**settings, pipeline_parallel_size=run.stages),
        arrivals=arrivals,
    )
    found = setup.simulator().run(arrivals)
    return setup, {"seconds": found.makespan, "ttft_s": sum(found.ttfts) / len(found.ttfts)}


def stage_seconds(fitted: str, own: str) -> float:
    """What the fit makes of the steps that were really taken, over what the stages took for them: how good the costs
    are, whatever the scheduler and the delays did."""
    trace, costs_of = read_trace(own), read_fit(fitted).pipeline.costs
    costs = costs_of(trace.metadata.layers_per_stage)
    predicted = measured = 0.0
    for step in trace.records:
        rows = step.num_decodes + step.num_chunks
        shape = StepShape(step.num_tokens, step.context_tokens, step.num_sampled, rows, step.kv_tokens)
        for cost, (began, ended) in zip(costs, step.busy, strict=True):
            predicted, measured = predicted + cost.seconds(shape), measured + ended - began
    return predicted / measured


def _note(
    result: dict[str, Any],
    args: argparse.Namespace,
    run: Run,
    number: int,
    fitted: str,
    own: str,
    measured: dict[str, Any],
) -> None:
    setup, predicted = predict(args, run, number, fitted)
    costs = stage_seconds(fitted, own)
    result["runs"].append(
        {
            "name": run.name,
            "round": number,
            "layers": setup.split,
            "measured": measured,
            "predicted": predicted,
            "stage_seconds": costs,
            "stages_are": setup.stages_are.rpartition("within ")[2],
        }
    )
    errors = " ".join(f"{key} {measured[key]:.3f} -> {predicted[key]:.3f}" for key in ("seconds", "ttft_s"))
    print(
        f"[{number + 1}] {run.name}: {errors}; stage seconds {costs:.3f}; others kept "
        f"{measured['other_cores']:.2f} cores busy",
        flush=True,
    )


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    device, runs = result["machine"], result["runs"]
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        cells = [name + (" (the trace)" if name == TRACED.name else "")]
        for key, digits in (("seconds", 2), ("ttft_s", 3)):
            ratios = [run["predicted"][key] / run["measured"][key] for run in mine]
            cells += [Spread.of([run["measured"][key] for run in mine]).text(digits), Spread.of(ratios).text(3)]
        cells.append(Spread.of([run["stage_seconds"] for run in mine]).text(3))
        rows.append(cells)
    others = Spread.of([run["measured"]["other_cores"] for run in runs]).text(2) if runs else "-"
    ratio = "predicted / measured"
    header = ["run", "measured, s", ratio, "first token, s", ratio, "stages' seconds, " + ratio]
    about = (
        f"`{result['model']}` in bf16, scheduler {result['scheduler']}, {result['rounds']} rounds, {result['when']}. "
        f"{device['cpu']}, {device['cores']} cores, a stage process of one thread on each. Cores that other processes "
        f"kept busy meanwhile: {others}. Every round is predicted from its own trace of the first run."
    )
    return "\n\n".join(["# Simulation against reality", about, markdown_table(header, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
