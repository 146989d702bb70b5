"""One engine driven by one or by two threads, once: what ``benchmarks.loops`` runs in a process of its own.

    python -m benchmarks.loops_turn LOOP MODEL --requests 1 64 --output-tokens 256

prints a JSON line per number of requests. The engine is the ordinary one, with one stage in this process and one plan
in flight; ``one`` puts both loops' bodies into the output thread, one after the other.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.transports.driver import percentile
from benchmarks.workloads import Workload, make_prompts
from llm_engine import LLM, SamplingParams
from llm_engine.core.trace import StepStats
from llm_engine.engine import engine as engine_module
from llm_engine.engine.core import EngineCore
from llm_engine.engine.threads import output_thread as output_thread_module
from llm_engine.engine.threads.output_thread import OutputThread
from llm_engine.engine.threads.scheduling_thread import SchedulingThread
from llm_engine.engine.threads.state import EngineState

PROMPT_TOKENS = 32
PARTS = ("to output thread", "retire", "to schedule", "schedule, book", "to stage")


class BothLoops(OutputThread):
    """Schedules and collects in turn, in one thread."""

    _scheduling: SchedulingThread | None = None

    def collect_once(self, state: EngineState, timeout: float | None) -> bool:
        """Both bodies once. Sleeps in the first while nothing is in flight, else in the second."""
        if self._scheduling is None:
            self._scheduling = SchedulingThread(state, self._executor, "never started")
        if not self._scheduling.schedule_once(wait=not state.core.in_flight):
            return False
        return super().collect_once(state, timeout if state.core.in_flight else 0.0)


class NoLoop(SchedulingThread):
    """Has nothing to do."""

    def run(self) -> None:
        """Ends at once."""


@contextmanager
def loops(number: str) -> Iterator[None]:
    """Engines made inside are driven by ``one`` thread or by ``two``."""
    if number == "two":
        yield
        return
    kept = engine_module.OutputThread, engine_module.SchedulingThread, output_thread_module.AFTER_YOU
    engine_module.OutputThread, engine_module.SchedulingThread = BothLoops, NoLoop
    output_thread_module.AFTER_YOU = 0.0  # there is nobody to let go first
    try:
        yield
    finally:
        engine_module.OutputThread, engine_module.SchedulingThread, output_thread_module.AFTER_YOU = kept


@dataclass(slots=True)
class Sections:
    """Times the parts that only compute, under the state lock: what a thread does not run there, it waits.

    It waits for the interpreter lock, or for a core that the kernel has given to somebody else; ``preempted`` are the
    steps of the latter.
    """

    waits: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    """Microseconds by step: of the schedule that made it, and of its retirement."""
    preempted: set[int] = field(default_factory=set)

    def attach(self, core: EngineCore) -> None:
        """While no request is there."""
        core.schedule = self._timed(core.schedule, lambda plan, _: plan and plan.step)  # type: ignore[method-assign]
        core.retire = self._timed(core.retire, lambda _, arguments: arguments[0].step)  # type: ignore[method-assign]

    def clear(self) -> None:
        self.waits.clear()
        self.preempted.clear()

    def of_nothing(self) -> float:
        """What a step whose sections do nothing reads, microseconds: what measuring adds."""
        measured, numbers = Sections(), range(101)
        nothing = measured._timed(lambda step: None, lambda _, arguments: arguments[0])
        for number in [*numbers, *numbers]:
            nothing(number)
        return percentile(list(measured.waits.values()), 0.5)

    def _timed(self, section: Callable[..., Any], step_of: Callable[[Any, Any], int | None]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
            wall, computed = time.perf_counter_ns(), time.thread_time_ns()
            found = section(*arguments)
            computed, wall = time.thread_time_ns() - computed, time.perf_counter_ns() - wall
            if (step := step_of(found, arguments)) is not None:
                self.waits[step] += max(wall - computed, 0) / 1000
                if resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw != switches:
                    self.preempted.add(step)
            return found

        return timed


def measure(llm: LLM, sections: Sections, requests: int, output_tokens: int, seed: int) -> dict[str, Any]:
    """Answer so many requests, submitted at once; warms up with others before."""
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    warm_up, prompts = (
        make_prompts(Workload(requests, 0, PROMPT_TOKENS, output_tokens), 2 * seed + i) for i in range(2)
    )
    highest = llm.engine.info.model.vocab_size
    warm_up, prompts = ([[i % highest for i in ids] for ids in many] for many in (warm_up, prompts))
    llm.generate(warm_up, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    sections.clear()
    began = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - began
    steps = [step for step in llm.get_stats() if step.began_at >= began]
    waits = [sections.waits[step.step] for step in steps]
    parts = gap_parts(steps)
    gaps = [sum(one) for one in parts]
    return {
        "requests": requests,
        "steps": len(steps),
        "steps_per_s": len(steps) / seconds,
        "tokens_per_s": sum(len(output.outputs[0].token_ids) for output in outputs) / seconds,
        "wait_p50_us": percentile(waits, 0.5),
        "wait_p99_us": percentile(waits, 0.99),
        "preempted_percent": 100 * len(sections.preempted) / len(steps),
        "gap_p50_us": percentile(gaps, 0.5),
        "gap_p99_us": percentile(gaps, 0.99),
        "gap_parts_us": {
            name: [percentile(one, 0.5), percentile(one, 0.99)]
            for name, one in zip(PARTS, zip(*parts, strict=True), strict=True)
        },
        "nothing_us": sections.of_nothing(),
    }


def gap_parts(steps: Sequence[StepStats]) -> list[tuple[float, ...]]:
    """Between a forward's end and the next one's begin, in microseconds, by ``PARTS``; from one step to the next."""
    found = []
    for this, after in pairwise(steps):
        edges = (
            this.busy[-1][1], this.collected_at, this.retired_at, after.began_at, after.booked_at, after.busy[0][0],
        )  # fmt: skip
        found.append(tuple((end - start) * 1e6 for start, end in pairwise(edges)))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=("one", "two"))
    parser.add_argument("model", help="folder of a checkpoint, or demo")
    parser.add_argument("--requests", type=int, nargs="+", required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True, help="number of the repeat: chooses the prompts")
    args = parser.parse_args()
    with loops(args.loop), open_engine(args.model) as (llm, sections):
        for requests in args.requests:
            print(json.dumps(measure(llm, sections, requests, args.output_tokens, args.seed)), flush=True)


@contextmanager
def open_engine(model: str) -> Iterator[tuple[LLM, Sections]]:
    """One stage in a thread of this process, one plan in flight, one core for the model: the rest is the host's."""
    sections = Sections()
    with LLM(
        model=None if model == "demo" else model,
        executor="inproc",
        pipeline_parallel_size=1,
        num_queues=1,
        schedule_ahead=False,
        cpu_threads=1,
        num_kv_blocks=64 * 32 + 1,
        enable_prefix_caching=False,
    ) as llm:
        sections.attach(llm.engine.state.core)
        yield llm, sections


if __name__ == "__main__":
    main()
