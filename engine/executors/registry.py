"""Executors by name: a factory takes the settings and the model's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...core.config import EngineConfig, ParallelConfig
from ...core.errors import ConfigError
from ...core.registry import Registry, check_class, make
from ...core.stage_settings import parse_remote_stages
from ...workers.model_engine import ModelEngine, Progress
from ...workers.placement import StagePlacement, place_stages, read_cores
from ...workers.sampler import BatchSampler, SamplerFactory
from ...workers.stage_model import importable_name
from .base import Executor
from .inproc import DEFAULT_BLOCK_SIZE, InprocExecutor


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """What an executor is built from."""

    config: EngineConfig
    make_model_engine: Callable[[int], ModelEngine]
    """By stage, called in the stage's own thread."""
    block_size: int | None
    make_sampler: SamplerFactory = BatchSampler
    progress: Progress | None = None
    model_path: str | None = None
    """Folder of the checkpoint; ``None`` where the caller brings the model engine."""
    on_cuda: bool = False


EXECUTORS: Registry[Executor] = Registry("executor", "llm_engine.executors")
EXECUTORS.add("inproc", ".engine.executors.registry:make_inproc", "a thread a stage, in this process")
EXECUTORS.add("zmq", ".engine.executors.registry:make_zmq", "a process a stage")


def make_executor(spec: ExecutorSpec) -> Executor:
    """Raises ``ConfigError`` listing the executors that exist. One of somebody else's is made as ``Class(spec)``."""
    name = spec.config.parallel.executor
    factory = EXECUTORS.get(_best(spec) if name == "auto" else name)
    check_class(factory, Executor, "executor", name)
    made: Executor = make(factory, Executor, "executor", name, spec)
    return made


def check_executor(name: str) -> None:
    """Raises ``ConfigError`` for a name that leads to no executor."""
    if name != "auto":
        check_class(EXECUTORS.get(name), Executor, "executor", name)


def _best(spec: ExecutorSpec) -> str:
    """Several stages are faster as processes; what cannot be imported there has to stay here."""
    parallel = spec.config.parallel
    if parallel.remote_stages is not None:
        return "zmq"
    if parallel.pipeline_parallel_size == 1:
        return "inproc"
    try:
        _names_of(spec)
    except ConfigError:
        return "inproc"
    return "zmq"


def _names_of(spec: ExecutorSpec) -> tuple[str | None, str]:
    """Under which names stage processes import the model engine's and the sampler's factories."""
    engine = None if spec.model_path is not None else importable_name("model_engine", spec.make_model_engine)
    return engine, importable_name("sampler", spec.make_sampler)


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


def make_zmq(spec: ExecutorSpec) -> Executor:
    """The stages as processes. Raises ``ConfigError`` where they could not import what they are to run."""
    from ...workers.pipeline_key import read_key
    from .zmq_bringup import StageSettings
    from .zmq_executor import ZmqExecutor

    model_engine, sampler = _names_of(spec)
    parallel = spec.config.parallel
    remote = parse_remote_stages(parallel.remote_stages, parallel.pipeline_parallel_size)
    settings = StageSettings(
        config=spec.config,
        block_size=spec.block_size or DEFAULT_BLOCK_SIZE,
        on_cuda=spec.on_cuda,
        model_path=spec.model_path,
        model_engine=model_engine,
        sampler=sampler,
        placements=_place(parallel, remote),
        remote=remote,
        key=None if parallel.pipeline_key is None else read_key(Path(parallel.pipeline_key)),
    )
    return ZmqExecutor(settings, spec.progress)


def _place(parallel: ParallelConfig, remote: frozenset[int]) -> dict[int, StagePlacement]:
    """Where the stages of this host compute: they alone share its cores."""
    local = [stage for stage in range(parallel.pipeline_parallel_size) if stage not in remote]
    if not local:
        return {}
    if not remote or parallel.stage_cpus not in ("auto", "none"):
        placements = place_stages(parallel, read_cores())
        return {stage: placements[stage] for stage in local}
    alone = ParallelConfig(
        pipeline_parallel_size=len(local), cpu_threads=parallel.cpu_threads, stage_cpus=parallel.stage_cpus
    )
    return dict(zip(local, place_stages(alone, read_cores()), strict=True))
