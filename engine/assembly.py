"""From settings to books: the same for an engine on real stages and for one on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.config import EngineConfig
from ..kvcache.kv_cache_manager import KVCacheManager
from ..kvcache.resources import BaseResourceManager, ResourceManager
from ..schedulers.limits import Limits
from ..schedulers.registry import SchedulerFactory, find_scheduler
from .core import EngineCore


def make_limits(config: EngineConfig, block_size: int, *, on_cuda: bool) -> Limits:
    """What every micro-batch respects, with the defaults of the device."""
    settings = config.scheduler
    return Limits(
        max_num_seqs=settings.max_num_seqs,
        max_micro_batch_seqs=settings.max_micro_batch_seqs or settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens or (2048 if on_cuda else 512),
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
    resources: Sequence[BaseResourceManager] = (),
    make_scheduler: SchedulerFactory | None = None,
) -> EngineCore:
    """Books with everything in them idle. Raises ``ConfigError`` for a scheduler nobody knows.

    ``make_scheduler`` takes the place of the one that the settings name; ``feeds_back`` says whether the stages take
    plans made ahead of their tokens.
    """
    settings = config.scheduler
    limits = make_limits(config, block_size, on_cuda=on_cuda)
    kv = KVCacheManager(
        num_kv_blocks,
        block_size,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        sliding_window=sliding_window,
    )
    container = ResourceManager(resources)
    scheduler = (make_scheduler or find_scheduler(settings, num_stages))(limits, container)
    # A scheduler of somebody else's may have no wish.
    wanted = getattr(scheduler, "num_queues", lambda num_stages: num_stages)(num_stages)
    return EngineCore(
        limits,
        kv,
        scheduler,
        container,
        num_queues=settings.num_queues or wanted,
        num_stages=num_stages,
        look_ahead=int(settings.schedule_ahead and feeds_back),
        scheduler_name=settings.scheduler,
    )
