"""A stage's torch model as the settings want it: what an executor makes in the stage's own thread or process."""

from __future__ import annotations

import torch

from ..core.config import EngineConfig
from .placement import stage_device
from .torch_model_engine import TorchModelEngine


def make_torch_stage(
    path: str, config: EngineConfig, stage: int, *, on_cuda: bool, num_threads: int | None
) -> TorchModelEngine:
    """The model of one stage; nothing is loaded yet. ``num_threads`` is of ``placement.place_stages``.

    Raises ``ConfigError`` for a device that is not there.
    """
    parallel = config.parallel
    device = f"cuda:{stage_device(parallel, stage, torch.cuda.device_count())}" if on_cuda else "cpu"
    return TorchModelEngine(
        path,
        stage=stage,
        num_stages=parallel.pipeline_parallel_size,
        layer_split=parallel.pipeline_layer_partition,
        dtype=config.model.dtype,
        device=device,
        max_model_len=config.model.max_model_len,
        memory_utilization=config.cache.gpu_memory_utilization,
        prefault_pool=config.cache.kv_cache_memory is not None,
        num_threads=num_threads,
    )
