"""What the pipeline grid is made of: models on devices, links, request mixes; and a simulation of one of its cells."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import CapacityError
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.report import figures
from llm_engine.simulation.setup import set_up
from llm_engine.simulation.workload import Arrival, lognormal, poisson, prompt

UNLIMITED = 1_000_000
"""A token budget that lets one micro-batch swallow everything."""
DEFAULT_BUDGET = 2048
BUDGETS = (64, 128, 256, 512, 1024, DEFAULT_BUDGET, 8192, UNLIMITED)
PUBLISHED = "benchmarks.published_rule:PublishedRule"

DEVICES = (
    ("l4", "llama-3-8b", (1, 2, 4)),
    ("h100", "llama-2-7b", (1, 2, 4)),
    ("rtx-4070", "llama-2-13b", (4, 8, 16)),
    ("a100-80g", "llama-3-70b", (4, 8, 16)),
    ("a100-40g", "mixtral-8x7b", (4, 8)),
)
LINKS = ("none", "pcie4", "lan-10g", "lan-1g")
MIXES = ("128/128", "32/256", "1024/64", "2048/16", "lognormal", "stream", "few")
RATES = {"l4": 5.0, "h100": 60.0, "rtx-4070": 4.0, "a100-80g": 5.0, "a100-40g": 12.0}
"""Requests a second of the stream: near what the devices can serve."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid."""

    hardware: str
    model: str
    stages: int
    link: str
    mix: str

    def __str__(self) -> str:
        return f"{self.model} on {self.stages} x {self.hardware}, {self.link}, {self.mix}"

    @property
    def key(self) -> str:
        return " ".join(str(part) for part in astuple(self))


def cells() -> Iterator[Cell]:
    """The whole grid."""
    for hardware, model, counts in DEVICES:
        for stages, link, mix in itertools.product(counts, LINKS, MIXES):
            if stages > 1 or link == LINKS[0]:
                yield Cell(hardware, model, stages, link, mix)


def requests(cell: Cell, seed: int = 0) -> list[Arrival]:
    """Who asks for what: fixed lengths at once, lengths drawn, the same as a Poisson stream, or a handful."""
    rng = random.Random(seed)
    match cell.mix:
        case "few":
            lengths = [(256, 128)] * 6
        case "lognormal" | "stream":
            lengths = [
                (min(2000, 8 + lognormal(250, 0.8, rng)), min(800, 4 + lognormal(150, 0.8, rng))) for _ in range(256)
            ]
        case mix:
            input_len, output_len = map(int, mix.split("/"))
            lengths = [(input_len, output_len)] * (256 if input_len <= 256 else 131072 // input_len)
    rate = RATES[cell.hardware] if cell.mix == "stream" else math.inf
    times = poisson(len(lengths), rate, rng)
    return [
        Arrival(at, prompt(index, input_len), output_len)
        for index, (at, (input_len, output_len)) in enumerate(zip(times, lengths, strict=True))
    ]


def simulate(cell: Cell, scheduler: str, budget: int) -> dict[str, Any]:
    """One run's figures; ``error`` where the devices cannot hold the model or a request."""
    setting = SimulationConfig(model_shape=cell.model, hardware=cell.hardware, stages=cell.stages, link=cell.link)
    engine = EngineConfig.of(scheduler=scheduler, max_num_batched_tokens=budget)
    try:
        setup = set_up(setting, engine, arrivals=requests(cell))
    except CapacityError as error:
        return {"error": str(error)}
    found = figures(setup.simulator().run(setup.arrivals))
    return {
        "makespan_s": found["makespan_s"],
        "output_throughput": found["output_throughput"],
        "ttft_s": found["ttft_s"]["mean"],
        "itl_p99_s": found["itl_s"]["p99"],
        "stage_busy": max((busy for busy in found["stage_busy"] if busy is not None), default=0.0),
        "preemptions": found["preemptions"],
        "steps": found["steps"],
        "failed_requests": found["failed_requests"],
    }
