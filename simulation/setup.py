"""From settings to a simulation that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.config import EngineConfig
from ..core.errors import CapacityError, ConfigError
from ..core.stage_settings import check_split
from ..engine.assembly import make_core, make_limits
from ..engine.core import EngineCore
from ..models.layer_cost import DECODE, PREFILL, layer_times
from ..models.layer_split import NAMED_SPLITS
from ..models.spec import ModelSpec
from ..schedulers.limits import Limits
from ..schedulers.registry import SchedulerFactory
from .config import SimulationConfig
from .hardware import Hardware, find_hardware
from .links import Link, parse_link
from .model_shapes import find_shape
from .pipeline import Pipeline
from .roofline import num_blocks_in_memory, roofline_costs, stage_memory
from .simulator import HostCost, Simulator
from .workload import Arrival, describe

DEFAULT_LINK = "lan-1g"
DEFAULT_HOST_OVERHEAD_US = 200.0
ITEMSIZES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run needs, every name resolved; makes simulators, any number of them."""

    simulation: SimulationConfig
    engine: EngineConfig
    spec: ModelSpec
    hardware: Hardware
    split: tuple[int, ...]
    """Layers of each stage."""
    num_kv_blocks: int
    """Block 0 included, which nobody gets."""
    block_size: int
    limits: Limits
    link: Link
    host: HostCost
    arrivals: Sequence[Arrival]
    make_scheduler: SchedulerFactory | None = None

    @property
    def link_name(self) -> str:
        """As it was said."""
        return self.simulation.link or DEFAULT_LINK

    def core(self) -> EngineCore:
        """Books as an engine would have them."""
        return make_core(
            self.engine,
            num_kv_blocks=self.num_kv_blocks,
            block_size=self.block_size,
            num_stages=len(self.split),
            on_cuda=self.hardware.on_cuda,
            sliding_window=self.spec.sliding_window,
            make_scheduler=self.make_scheduler,
        )

    def pipeline(self) -> Pipeline:
        """Stages and links with nothing in them."""
        itemsize = ITEMSIZES[self.engine.model.dtype]
        return Pipeline(
            roofline_costs(self.spec, self.split, self.hardware, itemsize),
            self.link,
            activation_bytes=self.spec.hidden_size * itemsize,
        )

    def simulator(self, *, keep_stats: int = 0, on_finished: Callable[[int], None] | None = None) -> Simulator:
        """One run's worth; ``run(setup.arrivals)`` is left to say."""
        return Simulator(self.core(), self.pipeline(), self.host, keep_stats=keep_stats, on_finished=on_finished)


def set_up(
    simulation: SimulationConfig | None = None,
    engine: EngineConfig | None = None,
    *,
    arrivals: Sequence[Arrival] | None = None,
    make_scheduler: SchedulerFactory | None = None,
) -> Setup:
    """Resolve every name.

    Raises ``ConfigError``, and ``CapacityError`` where the devices cannot hold the model or the cache a request.
    ``arrivals`` take the place of the workload that the settings describe, ``make_scheduler`` of the scheduler that
    they name.
    """
    simulation, engine = simulation or SimulationConfig(), engine or EngineConfig()
    spec = find_shape(simulation.model_shape, simulation.num_layers)
    hardware = find_hardware(simulation.hardware)
    link = parse_link(simulation.link or DEFAULT_LINK)
    itemsize = ITEMSIZES[engine.model.dtype]
    split = _split(spec, hardware, itemsize, simulation.stages, engine.parallel.pipeline_layer_partition)
    if arrivals is None:
        arrivals = describe(simulation, engine.model.seed, engine.model.max_model_len or spec.max_positions)
    block_size = engine.cache.block_size or (64 if hardware.on_cuda else 16)
    limits = make_limits(engine, block_size, on_cuda=hardware.on_cuda)
    if engine.cache.num_kv_blocks is not None:
        num_blocks = engine.cache.num_kv_blocks
    elif simulation.unlimited_kv:
        num_blocks = 2 + sum(-(-arrival.num_tokens // block_size) for arrival in arrivals)
    else:
        share = engine.cache.gpu_memory_utilization if hardware.on_cuda else 1.0
        stages = stage_memory(spec, split, hardware, itemsize, limits.max_num_batched_tokens, share)
        num_blocks = num_blocks_in_memory(stages, hardware, block_size)
    overhead = simulation.host_overhead_us
    half = (DEFAULT_HOST_OVERHEAD_US if overhead is None else overhead) * 0.5e-6
    setup = Setup(
        simulation,
        engine,
        spec,
        hardware,
        split,
        num_blocks,
        block_size,
        limits,
        link,
        HostCost(half, half),
        arrivals,
        make_scheduler,
    )
    _check_room(setup)
    return setup


def _split(
    spec: ModelSpec, hardware: Hardware, itemsize: int, num_stages: int, partition: str | None
) -> tuple[int, ...]:
    """As an engine would split it, by the times of this hardware."""
    if num_stages > spec.num_layers:
        raise ConfigError("stages", num_stages, f"at most the model's {spec.num_layers} layers")
    split = check_split(spec.num_layers, num_stages, partition)
    if isinstance(split, list):
        return tuple(split)
    if num_stages == 1:
        return (spec.num_layers,)
    decode, prefill = (layer_times(spec, shape, hardware.speed, itemsize) for shape in (DECODE, PREFILL))
    return tuple(NAMED_SPLITS[split or "auto"](decode, prefill, num_stages))


def _check_room(setup: Setup) -> None:
    """An engine refuses a request that the cache can never hold; so does a simulation, before it begins."""
    kv = setup.core().kv
    for index, arrival in enumerate(setup.arrivals):
        # The last token is sampled but never computed.
        needed = kv.peak_blocks(arrival.num_tokens - 1, setup.limits.max_num_batched_tokens)
        if needed > kv.num_usable_blocks:
            raise CapacityError(
                f"request {index}, with {len(arrival.prompt_token_ids)} tokens in and {arrival.output_len} out, needs "
                f"{needed} blocks of {kv.block_size}, and the cache has {kv.num_usable_blocks}; take more stages, "
                f"larger devices or shorter requests"
            )
