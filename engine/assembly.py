"""From settings to books: the same for an engine on real stages and for one on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.config import EngineConfig
from ..core.errors import ConfigError, SchedulerError
from ..kvcache.registry import check_resources, find_kv_cache_manager, make_resources
from ..kvcache.resources import BaseResourceManager, ResourceManager
from ..schedulers.base import Scheduler
from ..schedulers.limits import Limits
from ..schedulers.registry import SchedulerFactory, find_scheduler, scheduler_name
from .core import EngineCore

MOST_QUEUES = 1 << 16


def make_limits(config: EngineConfig, block_size: int, *, on_cuda: bool) -> Limits:
    """What every micro-batch respects, with the defaults of the device. Raises ``ConfigError`` for a chunk unit or a
    number of rows that the token budget has no room for; a default is fitted to it."""
    settings = config.scheduler
    budget = settings.max_num_batched_tokens or (2048 if on_cuda else 512)
    for name in ("chunk_unit", "max_micro_batch_seqs"):
        value = getattr(settings, name)
        if value is not None and value > budget:
            default = "" if settings.max_num_batched_tokens else ", the default here"
            raise ConfigError(name, value, f"at most max_num_batched_tokens, {budget}{default}")
    return Limits(
        max_num_seqs=settings.max_num_seqs,
        max_micro_batch_seqs=settings.max_micro_batch_seqs or min(settings.max_num_seqs, budget),
        max_num_batched_tokens=budget,
        chunk_unit=settings.chunk_unit or block_size,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
    )


def make_core(
    config: EngineConfig,
    *,
    num_kv_blocks: int,
    block_size: int,
    num_stages: int,
    on_cuda: bool,
    feeds_back: bool = True,
    sliding_window: int | None = None,
    active_share: float = 1.0,
    resources: Sequence[BaseResourceManager] | None = None,
    make_scheduler: SchedulerFactory | None = None,
) -> EngineCore:
    """Books with everything in them idle. Raises ``ConfigError`` for what nobody knows or can make.

    ``make_scheduler`` takes the place of the scheduler that the settings name, ``resources`` of the resources;
    ``feeds_back`` says whether the stages take plans made ahead of their tokens, ``active_share`` how much of its
    weights a token uses.
    """
    settings = config.scheduler
    limits = make_limits(config, block_size, on_cuda=on_cuda)
    kv = find_kv_cache_manager(config.cache.kv_cache_manager)(
        num_kv_blocks,
        block_size,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        sliding_window=sliding_window,
    )
    container = ResourceManager(make_resources(settings.resources) if resources is None else resources)
    scheduler = (make_scheduler or find_scheduler(settings, num_stages))(limits, container)
    name = scheduler_name(settings)
    return EngineCore(
        limits,
        kv,
        scheduler,
        container,
        num_queues=settings.num_queues or _wanted_queues(scheduler, num_stages, name),
        num_stages=num_stages,
        look_ahead=int(settings.schedule_ahead and feeds_back),
        active_share=active_share,
        scheduler_name=name,
    )


def check_names(config: EngineConfig) -> None:
    """Raise ``ConfigError`` for what nobody knows: cheap, and before anything is loaded."""
    find_scheduler(config.scheduler, config.parallel.pipeline_parallel_size)
    find_kv_cache_manager(config.cache.kv_cache_manager)
    check_resources(config.scheduler.resources)


def _wanted_queues(scheduler: Scheduler, num_stages: int, name: str) -> int:
    """A scheduler of somebody else's may have no wish, or one that cannot be."""
    ask = getattr(scheduler, "num_queues", None)
    if ask is None:
        return num_stages
    try:
        wanted = ask(num_stages)
    except Exception as error:
        raise SchedulerError(f"scheduler {name} raised {error!r} when asked for its number of queues") from error
    if type(wanted) is not int or not 0 < wanted <= MOST_QUEUES:
        raise SchedulerError(f"scheduler {name} wants {wanted!r} queues; allowed: 1 to {MOST_QUEUES}")
    return wanted
