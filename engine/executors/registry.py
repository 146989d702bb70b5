"""Executors by name: a factory takes the settings and the model's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...core.config import EngineConfig
from ...core.registry import Registry
from ...workers.model_engine import ModelEngine, Progress
from ...workers.sampler import BatchSampler, SamplerFactory
from .base import Executor
from .inproc import InprocExecutor


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """What an executor is built from."""

    config: EngineConfig
    make_model_engine: Callable[[int], ModelEngine]
    """By stage, called in the stage's own thread."""
    block_size: int | None
    make_sampler: SamplerFactory = BatchSampler
    progress: Progress | None = None


EXECUTORS: Registry[Executor] = Registry("executor", "llm_engine.executors")
EXECUTORS.add("inproc", ".engine.executors.registry:make_inproc", "a thread a stage, in this process")


def make_executor(spec: ExecutorSpec) -> Executor:
    """Raises ``ConfigError`` listing the executors that exist."""
    name = spec.config.parallel.executor
    return EXECUTORS.get("inproc" if name == "auto" else name)(spec)


def make_inproc(spec: ExecutorSpec) -> Executor:
    """The stages as threads of this process."""
    config = spec.config
    return InprocExecutor(
        spec.make_model_engine,
        num_stages=config.parallel.pipeline_parallel_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        block_size=spec.block_size,
        num_kv_blocks=config.cache.num_kv_blocks,
        kv_cache_memory=config.cache.kv_cache_memory,
        make_sampler=spec.make_sampler,
        progress=spec.progress,
        feeds_back=config.scheduler.schedule_ahead,
    )
