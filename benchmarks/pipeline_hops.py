"""What a hop between two stage processes costs, for activations of 32 KB and 1 MB.

    python -m benchmarks.pipeline_hops

Stages that compute nothing are linked as real ones are. A hop is what lies between the end of one stage's forward and
the beginning of the next one's: pack, send, wake up, unpack. One step is under way at a time, so nothing queues. The
last table is the way from push to result with two stages and with three: what one more stage costs, less the step that
it takes itself, beside a hop. Both pipelines live through a round and take a step in turn: so both meet the machine in
the same mood, which changes from second to second, and every process has slept equally long and finds as little of its
own in the caches. By itself a pipeline of two steps more often than one of three, and all it does is quicker for that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import machine, published
from benchmarks.published import spread
from benchmarks.report import Spread, markdown_table, terminal_table
from llm_engine.core.config import EngineConfig
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan, StepResult
from llm_engine.engine.executors.base import Executor
from llm_engine.engine.executors.registry import ExecutorSpec, make_executor
from llm_engine.workers.batch import StageBatch
from llm_engine.workers.model_engine import ModelInfo, Progress

WIDTH = 1024
"""float32 numbers of a token's hidden state: 4 KB."""
ROWS = {"32 KB": 8, "1 MB": 256}
"""Decodes in a step, by the size of what travels."""
STAGES = (2, 3)
LINKS = {"zmq": "processes, ipc", "inproc": "threads"}
EXECUTORS = tuple(LINKS)
WARM_UP = 30
VOCAB_SIZE = 97
Timed = tuple[float, StepResult, float]
"""When a plan was pushed, its result, and when that was collected."""
_VARIABLE = "PIPELINE_HOPS_STAGES"
"""Tells the stages' processes how many they are."""
MAX_LEN = 4096
SECONDS = 30.0
FIGURES = {
    "hop_p50_us": "hop p50, µs",
    "hop_p99_us": "hop p99, µs",
    "feed_p50_us": "push to first stage p50, µs",
    "collect_p50_us": "last stage to result p50, µs",
    "way_p50_us": "push to result p50, µs",
    "way_p99_us": "p99, µs",
}


class Idle:
    """A model engine that computes nothing: it hands on one and the same hidden state."""

    def __init__(self, stage: int) -> None:
        self._is_last = stage == int(os.environ[_VARIABLE]) - 1
        shape = (max(ROWS.values()), VOCAB_SIZE if self._is_last else WIDTH)
        self._output: NDArray[np.float32] = np.random.default_rng(stage).random(shape, np.float32)

    def load(self, progress: Progress | None = None) -> ModelInfo:
        return ModelInfo("Idle", VOCAB_SIZE, MAX_LEN, "float32", num_layers=1)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        pass

    def forward(self, batch: StageBatch, hidden: Any) -> NDArray[np.float32]:
        return self._output[: len(batch.logit_rows) if self._is_last else batch.num_tokens]

    def check_device(self) -> None:
        pass

    def release(self) -> None:
        pass


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=1000, help="that are timed in a round (default: 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    published.add_arguments(parser, "pipeline_hops", "transport.md")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.repeats = 50, 1
    if args.repeats < 1 or not 10 <= args.steps <= MAX_LEN - WARM_UP - 1:
        parser.error(f"--repeats must be 1 or more, --steps from 10 to {MAX_LEN - WARM_UP - 1}")
    published.settle_arguments(parser, args, "pipeline_hops", "transport.md", whole=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse_args(argv)
    result = measure_all(args)
    from rich.console import Console

    console = Console()
    console.print(terminal_table(*hop_table(result)), terminal_table(*stage_table(result)))
    console.print(published.circumstances(result, said(result)))
    published.publish(args, "pipeline_hops", result, "What a hop costs", section(result))
    return 0


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Every size over every number of stages, in turn."""
    result = published.begin(args.repeats, {"pyzmq": version("pyzmq"), "msgspec": version("msgspec")})
    result["steps"] = args.steps
    cases = [(executor, size) for executor in EXECUTORS for size in ROWS]
    with tqdm(total=args.repeats * len(cases), desc="Hops", unit="run", dynamic_ncols=True) as bar:
        for repeat in range(args.repeats):
            for executor, size in cases:
                bar.set_postfix_str(f"{executor}, {size}", refresh=False)
                load, others = os.getloadavg()[0], machine.OtherWork()
                measured = measure(executor, ROWS[size], args.steps)
                about = {"executor": executor, "size": size, "repeat": repeat, "load_before": load}
                about["other_cores"] = others.cores()
                result["runs"] += [about | {"stages": stages} | figures for stages, figures in measured.items()]
                bar.update()
    return result


def measure(name: str, num_rows: int, num_steps: int) -> dict[int, dict[str, Any]]:
    """One life of both pipelines; their figures by the number of stages."""
    with ExitStack() as running:
        pipelines = {stages: running.enter_context(pipeline(name, num_rows, stages)) for stages in STAGES}
        timed: dict[int, list[Timed]] = {stages: [] for stages in STAGES}
        for executor in pipelines.values():
            take(executor, first_plan(num_rows))
        for step in range(1, WARM_UP + num_steps):
            for stages, executor in pipelines.items():
                taken = take(executor, decode_plan(num_rows, step))
                if step >= WARM_UP:
                    timed[stages].append(taken)
    return {stages: figures_of(ones) for stages, ones in timed.items()}


@contextmanager
def pipeline(name: str, num_rows: int, num_stages: int) -> Iterator[Executor]:
    """Stages that are ready."""
    os.environ[_VARIABLE] = str(num_stages)
    config = EngineConfig.of(
        pipeline_parallel_size=num_stages,
        stage_cpus="none",  # pinned or not would depend on the number of stages
        max_num_seqs=num_rows,
        num_kv_blocks=num_rows + 1,
        executor=name,
    )
    executor = make_executor(ExecutorSpec(config, Idle, block_size=MAX_LEN))
    try:
        executor.start()
        yield executor
    finally:
        executor.shutdown()


def figures_of(timed: list[Timed]) -> dict[str, Any]:
    """Lists have one for each stage or hop, in order."""
    num_stages = len(timed[0][1].busy)
    by_hop = [[result.busy[at][0] - result.busy[at - 1][1] for _, result, _ in timed] for at in range(1, num_stages)]
    by_stage = [[result.busy[at][1] - result.busy[at][0] for _, result, _ in timed] for at in range(num_stages)]
    hops = [seconds for one in by_hop for seconds in one]
    ways = [collected - pushed for pushed, _, collected in timed]
    micro = 1e6
    return {
        "hop_p50_us": statistics.median(hops) * micro,
        "hop_p99_us": float(np.quantile(hops, 0.99)) * micro,
        "hops_p50_us": [statistics.median(one) * micro for one in by_hop],
        "steps_p50_us": [statistics.median(one) * micro for one in by_stage],
        "feed_p50_us": statistics.median(result.busy[0][0] - pushed for pushed, result, _ in timed) * micro,
        "collect_p50_us": statistics.median(collected - result.busy[-1][1] for _, result, collected in timed) * micro,
        "way_p50_us": statistics.median(ways) * micro,
        "way_p99_us": float(np.quantile(ways, 0.99)) * micro,
    }


def take(executor: Executor, plan: StepPlan) -> Timed:
    """Run one step. Raises ``RuntimeError`` where no result comes of it."""
    pushed = time.monotonic()
    executor.push(plan)
    result = executor.collect(SECONDS)
    collected = time.monotonic()
    if not isinstance(result, StepResult) or result.error is not None:
        raise RuntimeError(f"no result: {result}")
    return pushed, result, collected


def first_plan(num_rows: int) -> StepPlan:
    """Starts every request with a prompt of one token."""
    greedy = SamplingParams(temperature=0.0)
    return StepPlan(
        queue=0,
        chunk_ids=list(range(num_rows)),
        chunk_tokens=[1] * num_rows,
        chunk_slots=list(range(num_rows)),
        chunk_starts=[0] * num_rows,
        chunk_samples=[True] * num_rows,
        starts=[RequestStart(row, row, [1], 1, [row + 1], greedy, 0, 0, []) for row in range(num_rows)],
    )


def decode_plan(num_rows: int, step: int) -> StepPlan:
    """One more token for everybody."""
    return StepPlan(
        queue=0,
        step=step,
        decode_ids=range(num_rows),
        decode_slots=range(num_rows),
        decode_positions=[step] * num_rows,
        decode_tokens=[1] * num_rows,
    )


def runs_of(result: dict[str, Any], executor: str, size: str, stages: int) -> list[dict[str, Any]]:
    """A case's runs, round by round."""
    return [run for run in result["runs"] if (run["executor"], run["size"], run["stages"]) == (executor, size, stages)]


def hop_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: where a step's time goes."""
    rows = [
        [f"{LINKS[executor]}, {size}, {stages} stages", *(spread([run[key] for run in runs]) for key in FIGURES)]
        for executor in EXECUTORS
        for size in ROWS
        for stages in STAGES
        if (runs := runs_of(result, executor, size, stages))
    ]
    return ["link, activations", *FIGURES.values()], rows


def stage_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the way with three stages less the way with two, less what the stage in the middle computes,
    against a hop of either; and the hops of the three stages by themselves."""
    rows = []
    for executor in EXECUTORS:
        for size in ROWS:
            few, more = (runs_of(result, executor, size, stages) for stages in STAGES)
            if few and more:
                extra = [b["way_p50_us"] - a["way_p50_us"] for a, b in zip(few, more, strict=True)]
                steps = [run["steps_p50_us"][1] for run in more]
                less = [way - step for way, step in zip(extra, steps, strict=True)]
                hops = [(a["hop_p50_us"] + b["hop_p50_us"]) / 2 for a, b in zip(few, more, strict=True)]
                of_a_hop = Spread.of([left / hop for left, hop in zip(less, hops, strict=True)])
                each = " / ".join(spread(list(hop)) for hop in zip(*(run["hops_p50_us"] for run in more), strict=True))
                cells = [*map(spread, (extra, steps, less, hops)), of_a_hop.text(2), each]
                rows.append([f"{LINKS[executor]}, {size}", *cells])
    header = [
        "link, activations", "one more stage p50, µs", "its own step", "less its own step", "a hop", "ratio",
        "hop to the middle / to the last",
    ]  # fmt: skip
    return header, rows


def said(result: dict[str, Any]) -> str:
    """What only this benchmark knows."""
    rows = ", ".join(f"{number} decodes for {size}" for size, number in ROWS.items())
    steps = f"{result['steps']:,} steps each, one at a time and by both pipelines in turn"
    return f"{steps}, stages that compute nothing ({rows})"


def section(result: dict[str, Any]) -> str:
    """What goes into a page."""
    tables = (markdown_table(*hop_table(result)), markdown_table(*stage_table(result)))
    return "\n\n".join([*tables, published.circumstances(result, said(result))])


if __name__ == "__main__":
    # Under its own name, by which a stage's process imports the engine from it.
    from benchmarks.pipeline_hops import main as run

    sys.exit(run())
