"""From settings to a simulation that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import EngineConfig
from ..core.errors import CapacityError, ConfigError
from ..engine.assembly import make_core, make_limits
from ..engine.core import EngineCore
from ..models.layer_split import even_split
from ..models.spec import ModelSpec
from ..schedulers.registry import SchedulerFactory
from .config import SimulationConfig
from .hardware import GIB, Hardware, find_hardware
from .links import parse_link
from .model_shapes import find_shape
from .pipeline import Pipeline
from .roofline import stage_costs, stage_memory
from .simulator import HostCost, Simulator
from .workload import Arrival, fixed

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a run needs; ``simulator()`` makes one, any number of times."""

    simulation: SimulationConfig
    engine: EngineConfig
    spec: ModelSpec
    hardware: Hardware
    split: list[int]
    num_kv_blocks: int
    block_size: int
    arrivals: list[Arrival]
    make_scheduler: SchedulerFactory | None = None

    def make_core(self) -> EngineCore:
        return make_core(
            self.engine,
            num_kv_blocks=self.num_kv_blocks,
            block_size=self.block_size,
            num_stages=len(self.split),
            on_cuda=self.hardware.on_cuda,
            sliding_window=self.spec.sliding_window,
            make_scheduler=self.make_scheduler,
        )

    def make_pipeline(self) -> Pipeline:
        itemsize = _ITEMSIZES[self.engine.model.dtype]
        costs = stage_costs(self.spec, self.split, self.hardware, itemsize)
        link = parse_link(self.simulation.link)
        return Pipeline(costs, link, activation_bytes=self.spec.hidden_size * itemsize)

    def simulator(self, *, keep_stats: bool = False) -> Simulator:
        half = self.simulation.host_overhead_us * 0.5e-6
        return Simulator(self.make_core(), self.make_pipeline(), HostCost(half, half), keep_stats=keep_stats)


def set_up(
    simulation: SimulationConfig,
    engine: EngineConfig | None = None,
    *,
    arrivals: list[Arrival] | None = None,
    make_scheduler: SchedulerFactory | None = None,
) -> Setup:
    """Resolve every name. Raises ``ConfigError``, and ``CapacityError`` where the devices cannot hold the model.

    ``arrivals`` take the place of the workload that the settings describe, ``make_scheduler`` of the scheduler that
    they name.
    """
    engine = engine or EngineConfig()
    spec = find_shape(simulation.model_shape, simulation.num_layers)
    hardware = find_hardware(simulation.hardware)
    parse_link(simulation.link)
    if simulation.stages > spec.num_layers:
        raise ConfigError("stages", simulation.stages, f"at most the model's {spec.num_layers} layers")
    split = even_split(spec.num_layers, simulation.stages)
    if arrivals is None:
        arrivals = fixed(
            simulation.requests,
            simulation.input_len,
            simulation.output_len,
            rate=simulation.rate,
            seed=engine.model.seed,
        )
    block_size = engine.cache.block_size or (64 if hardware.on_cuda else 16)
    budget = make_limits(engine, block_size, on_cuda=hardware.on_cuda).max_num_batched_tokens
    if engine.cache.num_kv_blocks is not None:
        num_blocks = engine.cache.num_kv_blocks
    elif simulation.unlimited_kv:
        num_blocks = 1 + sum(-(-(len(a.prompt_token_ids) + a.output_len) // block_size) for a in arrivals)
    else:
        num_blocks = _blocks_in_memory(spec, split, hardware, engine, block_size, budget)
    return Setup(simulation, engine, spec, hardware, split, max(num_blocks, 2), block_size, arrivals, make_scheduler)


def _blocks_in_memory(
    spec: ModelSpec, split: list[int], hardware: Hardware, engine: EngineConfig, block_size: int, budget: int
) -> int:
    """The least over the stages, as in an engine."""
    share = engine.cache.gpu_memory_utilization
    itemsize = _ITEMSIZES[engine.model.dtype]
    least = None
    for stage, memory in enumerate(stage_memory(spec, split, hardware, itemsize, budget)):
        left = hardware.memory * share - memory.weights - memory.activations - memory.runtime
        blocks = int(left // (memory.kv_per_token * block_size))
        if blocks < 2:
            raise CapacityError(
                f"stage {stage} of {len(split)} cannot hold its part of the model: {memory.weights / GIB:.2f} GiB of "
                f"weights, {memory.activations / GIB:.2f} of activations, {memory.runtime / GIB:.2f} of the runtime "
                f"leave {left / GIB:.2f} of {hardware.memory * share / GIB:.2f} GiB "
                f"({share:.0%} of {hardware.memory / GIB:.0f}); take more stages or larger devices"
            )
        least = blocks if least is None else min(least, blocks)
    assert least is not None
    return least
