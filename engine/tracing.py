"""What a step trace says of the engine that made it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict

from ..core.version import __version__
from ..metrics.step_trace import TraceMetadata
from .core import EngineCore
from .executors.base import ExecutorInfo


def describe_run(core: EngineCore, info: ExecutorInfo, model_name: str, on_cuda: bool) -> TraceMetadata:
    """For an engine whose stages just came up."""
    return TraceMetadata(
        version=__version__,
        model=model_name,
        scheduler=core.scheduler_name,
        num_stages=info.num_stages,
        num_queues=len(core.table.queues),
        layers_per_stage=info.layers_per_stage,
        limits=asdict(core.limits),
        num_kv_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        num_cores=os.cpu_count(),
        on_cuda=on_cuda,
        sliding_window=core.kv.layout.sliding_window,
        max_model_len=info.model.max_model_len,
        started_at=time.time(),
        clock=time.monotonic(),
    )
