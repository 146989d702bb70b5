"""From settings to a simulation that is ready to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.config import CacheConfig, EngineConfig
from ..core.errors import CapacityError, ConfigError
from ..engine.assembly import make_core, make_limits
from ..engine.core import EngineCore
from ..models.layer_cost import layer_times
from ..schedulers.limits import Limits
from ..schedulers.registry import SchedulerFactory
from .config import SimulationConfig
from .fitted import read_fit
from .hardware import find_hardware
from .links import Link, parse_link
from .model_shapes import dtype_of, find_shape
from .pipeline import Pipeline
from .report import Slo
from .roofline import num_blocks_in_memory, roofline_costs, stage_memory
from .simulator import HostCost, Simulator
from .splits import split_layers
from .workload import Arrival, describe
from .workloads import WORKLOADS

DEFAULT_SHAPE = "llama-2-13b"
DEFAULT_STAGES = 4
DEFAULT_LINK = "lan-1g"
DEFAULT_HARDWARE = "rtx-4070"
DEFAULT_HOST_OVERHEAD_US = 200.0
MOST_BLOCKS = 1 << 24
"""About a gigabyte of books."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a run needs, every name resolved; makes simulators, any number of them."""

    simulation: SimulationConfig
    engine: EngineConfig
    arrivals: Sequence[Arrival]
    split: tuple[int, ...]
    """Layers of each stage."""
    make_pipeline: Callable[[], Pipeline]
    """Stages and links with nothing in them."""
    link: Link
    host: HostCost
    on_cuda: bool
    num_kv_blocks: int
    """Block 0 included, which nobody gets."""
    block_size: int
    limits: Limits
    sliding_window: int | None
    model: str
    stages_are: str
    """Where the costs come from, in words."""
    hardware: str | None
    """``None`` where a trace tells what the stages cost; so with the next one."""
    dtype: str | None
    link_name: str
    max_model_len: int
    active_share: float = 1.0
    make_scheduler: SchedulerFactory | None = None

    @property
    def slo(self) -> Slo:
        """What counts as a good answer: as told, or as the workload has it."""
        simulation = self.simulation
        named = WORKLOADS.get(simulation.workload or "")
        ttft, itl = (None, None) if named is None else (named.slo_ttft, named.slo_itl)
        return Slo(
            ttft if simulation.slo_ttft_ms is None else simulation.slo_ttft_ms / 1000,
            itl if simulation.slo_itl_ms is None else simulation.slo_itl_ms / 1000,
        )

    def make_core(self) -> EngineCore:
        """Books as an engine would have them."""
        return make_core(
            self.engine,
            num_kv_blocks=self.num_kv_blocks,
            block_size=self.block_size,
            num_stages=len(self.split),
            on_cuda=self.on_cuda,
            sliding_window=self.sliding_window,
            active_share=self.active_share,
            make_scheduler=self.make_scheduler,
        )

    def simulator(self, *, keep_stats: int = 0, on_finished: Callable[[int], None] | None = None) -> Simulator:
        """One run's worth; ``run(setup.arrivals)`` is left to say."""
        core, pipeline = self.make_core(), self.make_pipeline()
        return Simulator(core, pipeline, self.host, keep_stats=keep_stats, on_finished=on_finished)


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
    if simulation.unlimited_kv and engine.cache.num_kv_blocks is not None:
        raise ConfigError("num_kv_blocks", engine.cache.num_kv_blocks, "nothing beside unlimited_kv")
    _check_beside_a_fit(simulation, engine)
    make = _by_roofline if simulation.fit is None else _by_fit
    setup = make(simulation, engine, arrivals, make_scheduler)
    _check_room(setup)
    return setup


def _by_roofline(
    simulation: SimulationConfig,
    engine: EngineConfig,
    arrivals: Sequence[Arrival] | None,
    make_scheduler: SchedulerFactory | None,
) -> Setup:
    shape = simulation.model_shape or DEFAULT_SHAPE
    spec = find_shape(shape, simulation.num_layers)
    name = simulation.hardware or DEFAULT_HARDWARE
    hardware = find_hardware(name)
    link_name = simulation.link or DEFAULT_LINK
    link = parse_link(link_name)
    dtype, itemsize = _dtype(engine, shape)
    split = split_layers(
        spec.num_layers,
        simulation.stages or DEFAULT_STAGES,
        engine.parallel.pipeline_layer_partition,
        lambda step: layer_times(spec, step, hardware.speed, itemsize),
    )
    max_model_len = engine.model.max_model_len or spec.max_positions
    if arrivals is None:
        arrivals = describe(simulation, engine.model.seed, max_model_len)
    block_size = engine.cache.block_size or (64 if hardware.on_cuda else 16)
    limits = make_limits(engine, block_size, on_cuda=hardware.on_cuda)
    num_blocks = _told_blocks(simulation, engine, arrivals, block_size)
    if num_blocks is None:
        share = engine.cache.gpu_memory_utilization if hardware.on_cuda else 1.0
        stages = stage_memory(spec, split, hardware, itemsize, limits.max_num_batched_tokens, share)
        num_blocks = num_blocks_in_memory(stages, hardware, block_size)
    costs = roofline_costs(spec, split, hardware, itemsize)
    activation_bytes = spec.hidden_size * itemsize
    return Setup(
        simulation=simulation,
        engine=engine,
        arrivals=arrivals,
        split=split,
        make_pipeline=lambda: Pipeline(costs, link, activation_bytes=activation_bytes),
        link=link,
        host=_told_host(simulation) or _host_of(DEFAULT_HOST_OVERHEAD_US),
        on_cuda=hardware.on_cuda,
        num_kv_blocks=num_blocks,
        block_size=block_size,
        limits=limits,
        sliding_window=spec.sliding_window,
        active_share=spec.active_share,
        model=shape,
        hardware=name,
        dtype=dtype,
        max_model_len=max_model_len,
        link_name=link_name,
        stages_are=f"{name}, link {link_name}",
        make_scheduler=make_scheduler,
    )


def _by_fit(
    simulation: SimulationConfig,
    engine: EngineConfig,
    arrivals: Sequence[Arrival] | None,
    make_scheduler: SchedulerFactory | None,
) -> Setup:
    assert simulation.fit is not None
    fitted = read_fit(simulation.fit)
    partition, its_stages = engine.parallel.pipeline_layer_partition, len(fitted.layers_per_stage)
    if partition is None and simulation.stages in (None, its_stages):
        split = fitted.layers_per_stage
    else:
        fit = fitted.pipeline
        split = split_layers(fit.num_layers, simulation.stages or its_stages, partition, fit.layer_times)
    max_model_len = engine.model.max_model_len or fitted.max_model_len
    if arrivals is None:
        arrivals = describe(simulation, engine.model.seed, max_model_len)
    engine = fitted.with_its_limits(engine)
    block_size = engine.cache.block_size or fitted.block_size
    num_blocks = _told_blocks(simulation, engine, arrivals, block_size) or fitted.blocks_of(block_size)
    link, activation_bytes, dtype = fitted.link, 1.0, None
    if simulation.link is not None:
        assert simulation.model_shape is not None
        link = parse_link(simulation.link)
        dtype, itemsize = _dtype(engine, simulation.model_shape)
        activation_bytes = float(find_shape(simulation.model_shape).hidden_size * itemsize)
    costs, delays = fitted.pipeline.costs(split), fitted.pipeline.delays.delays
    return Setup(
        simulation=simulation,
        engine=engine,
        arrivals=arrivals,
        split=split,
        make_pipeline=lambda: Pipeline(costs, link, activation_bytes=activation_bytes, delays=delays),
        link=link,
        host=_told_host(simulation) or fitted.host,
        on_cuda=fitted.on_cuda,
        num_kv_blocks=num_blocks,
        block_size=block_size,
        limits=make_limits(engine, block_size, on_cuda=fitted.on_cuda),
        sliding_window=fitted.sliding_window,
        model=fitted.model,
        hardware=None,
        dtype=dtype,
        link_name=simulation.link or "fitted",
        max_model_len=max_model_len,
        stages_are=f"fitted to {simulation.fit} within {100 * fitted.pipeline.error:.1f} %{fitted.not_told}",
        make_scheduler=make_scheduler,
    )


def _check_beside_a_fit(simulation: SimulationConfig, engine: EngineConfig) -> None:
    """What a trace tells already cannot be told otherwise. Raises ``ConfigError`` naming both."""
    if simulation.fit is None:
        return
    for name in ("hardware", "num_layers"):
        if getattr(simulation, name) is not None:
            raise ConfigError(name, getattr(simulation, name), "nothing beside fit: the trace tells what stages cost")
    if simulation.model_shape is not None and simulation.link is None:
        raise ConfigError(
            "model_shape", simulation.model_shape, "nothing beside fit, unless link is told too: it sizes activations"
        )
    if simulation.link is not None and simulation.model_shape is None:
        raise ConfigError("link", simulation.link, "nothing beside a fit, unless model_shape tells the activations")
    if engine.model.dtype != "auto" and simulation.link is None:
        raise ConfigError("dtype", engine.model.dtype, "nothing beside fit, unless link is told too: the costs have it")
    share = engine.cache.gpu_memory_utilization
    if share != CacheConfig().gpu_memory_utilization:
        allowed = "nothing beside fit: the trace tells its pool; num_kv_blocks tells another one"
        raise ConfigError("gpu_memory_utilization", share, allowed)


def _dtype(engine: EngineConfig, shape: str) -> tuple[str, int]:
    """What the simulated engine computes in, and its bytes."""
    name = dtype_of(shape) if engine.model.dtype == "auto" else engine.model.dtype
    return name, 4 if name == "float32" else 2


def _host_of(microseconds: float) -> HostCost:
    return HostCost(0.5e-6 * microseconds, 0.5e-6 * microseconds)


def _told_host(simulation: SimulationConfig) -> HostCost | None:
    return None if simulation.host_overhead_us is None else _host_of(simulation.host_overhead_us)


def _told_blocks(
    simulation: SimulationConfig, engine: EngineConfig, arrivals: Sequence[Arrival], block_size: int
) -> int | None:
    if engine.cache.num_kv_blocks is not None:
        return engine.cache.num_kv_blocks
    if simulation.unlimited_kv:
        return 2 + sum(math.ceil(arrival.num_tokens / block_size) for arrival in arrivals)
    return None


def _check_room(setup: Setup) -> None:
    """An engine refuses a request that the cache can never hold; so does a simulation, before it begins."""
    if setup.num_kv_blocks > MOST_BLOCKS:
        if setup.simulation.unlimited_kv:
            allowed = (
                f"a load that needs at most {MOST_BLOCKS} blocks, not {setup.num_kv_blocks}: the host keeps their books"
            )
            raise ConfigError("unlimited_kv", True, allowed)
        raise ConfigError("num_kv_blocks", setup.num_kv_blocks, f"at most {MOST_BLOCKS}: the host keeps their books")
    kv = setup.make_core().kv
    for index, arrival in enumerate(setup.arrivals):
        # The last token is sampled but never computed.
        needed = kv.peak_blocks(arrival.num_tokens - 1, setup.limits.max_num_batched_tokens)
        if needed > kv.num_usable_blocks:
            raise CapacityError(
                f"request {index}, with {len(arrival.prompt_token_ids)} tokens in and {arrival.output_len} out, needs "
                f"{needed} blocks of {kv.block_size}, and the cache has {kv.num_usable_blocks}; take more stages, "
                f"larger devices or shorter requests"
            )
