"""Settings: one frozen dataclass per owner, composed in ``EngineConfig``; flags are derived from the fields.

A field's ``help`` becomes the flag's help. Derived facts (the number of blocks, the context length) are results of
start-up, never written back.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, TypedDict

from .errors import ConfigError
from .stage_settings import (
    check_pipeline_address,
    parse_layer_partition,
    parse_remote_stages,
    parse_stage_cpus,
    parse_stage_devices,
)


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text; ``choices=``: the allowed values, ``flag=``: how a flag is spelled that is not the
    name."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is served."""

    model: str | None = option(None, "a local folder or a hub name; the bundled demo model when absent")
    tokenizer: str | None = option(None, "folder or hub name of the tokenizer; the model's own when absent")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    download_dir: str | None = option(None, "where hub files are kept; the hub's usual cache when absent")
    dtype: str = option(
        "auto",
        "type of weights and cache; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_model_len: int | None = option(None, "longest prompt + output in tokens; the model's own limit when absent")
    device: str = option("auto", "auto takes CUDA where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seeds the requests that bring none")

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "max_model_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int | None = option(None, "tokens per block, a power of two; 16 on the CPU, 64 on CUDA when absent")
    num_kv_blocks: int | None = option(None, "blocks in the pool; sized from memory when absent")
    kv_cache_memory: int | None = option(
        None,
        "bytes for the pool, where num_kv_blocks is absent; on the CPU its memory is taken at the start",
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the device's memory for weights and pool on CUDA; on the CPU a quarter of what is free is taken"
    )
    enable_prefix_caching: bool = option(True, "reuse the cached blocks of equal prefixes")
    kv_cache_manager: str = option(
        "lru", "who keeps the books of the pool, and so what is lost first: lru, or package.module:Class"
    )

    def __post_init__(self) -> None:
        check_at_least(self, 2, "num_kv_blocks")
        check_at_least(self, 1, "kv_cache_memory")
        size = self.block_size
        if size is not None and (size < 1 or size & (size - 1)):
            raise ConfigError("block_size", size, "a power of two")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError("gpu_memory_utilization", self.gpu_memory_utilization, "above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Who runs next, and how much of it."""

    scheduler: str = option("default", "a preset's name (llm-engine schedulers lists them) or package.module:Class")
    ordering: str | None = option(None, "who waits first, instead of the preset's choice")
    capacity: str | None = option(None, "who may hold KV memory, instead of the preset's choice")
    micro_batch: str | None = option(None, "what runs now, instead of the preset's choice")
    scheduler_options: Mapping[str, Any] | None = option(
        None,
        "an option of the chosen parts, like aging_s=5 or ordering.aging_s=5, as often as wanted; "
        "llm-engine schedulers lists them",
        flag="--scheduler-option",
    )
    resources: tuple[str, ...] = option(
        (),
        "resources that gate admission, each package.module:Class or a name that a package registers",
        flag="--resource",
    )
    max_num_seqs: int = option(256, "requests resident at a time")
    max_micro_batch_seqs: int | None = option(None, "requests in one micro-batch; max_num_seqs when absent")
    max_num_batched_tokens: int | None = option(None, "tokens in one micro-batch; 2048, or 512 on the CPU, when absent")
    long_prefill_token_threshold: int | None = option(None, "longest chunk of one prompt in a micro-batch")
    chunk_unit: int | None = option(
        None, "chunks that do not end a prompt are multiples of this; the block size when absent"
    )
    max_num_waiting: int | None = option(None, "requests that may wait; more are refused; no limit when absent")
    num_queues: int | None = option(
        None, "micro-batches that may be in flight, each with decodes of its own; chosen by measurement when absent"
    )
    schedule_ahead: bool = option(
        True,
        "push a queue's next step before the tokens of its last one are known: no stage waits for the books",
    )

    def __post_init__(self) -> None:
        check_at_least(
            self,
            1,
            "max_num_seqs",
            "max_micro_batch_seqs",
            "max_num_batched_tokens",
            "long_prefill_token_threshold",
            "chunk_unit",
            "max_num_waiting",
            "num_queues",
        )
        check_options(self.scheduler_options)
        if not isinstance(self.resources, tuple) or not all(isinstance(name, str) for name in self.resources):
            raise ConfigError("resources", self.resources, "names in a tuple")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How many stages, and where they run."""

    pipeline_parallel_size: int = option(1, "stages the layers are split into")
    executor: str = option(
        "auto",
        "who runs the stages: inproc (a thread each), zmq (a process each), or package.module:Class; auto takes zmq "
        "for several stages, where their processes can import what they are to run",
    )
    cpu_threads: int | None = option(
        None, "threads each stage computes with on the CPU; torch's choice, or cores / stages, when absent"
    )
    pipeline_layer_partition: str | None = option(
        None,
        "layers of each stage (6,6), or a split by estimated time: decode (best for long answers), prefill (best for "
        "long prompts), mixed, even, or auto, also when absent: even, less on the head's stage where that is free",
    )
    stage_cpus: str = option(
        "auto",
        "CPUs of each stage process (0-3;4-7), none to leave them to the system, or auto: the cores shared out, as far "
        "as there is one for each",
    )
    stage_devices: str | None = option(None, "CUDA device of each stage (0,1); one after the other when absent")
    pipeline_address: str | None = option(
        None, "where stages of other hosts join: tcp://HOST:PORT of this one; none where all stages run here"
    )
    pipeline_key: str | None = option(
        None, "key file shared by the engine and the stages of other hosts; llm-engine stage --new-key writes one"
    )
    remote_stages: str | None = option(
        None, "stages that are started by hand on other hosts (1,2), with llm-engine stage; none when absent"
    )
    max_stage_restarts: int = option(
        3, "times within five minutes that stage processes which died are started again; then the engine is dead"
    )
    on_stage_death: str = option(
        "replay",
        "what becomes of the requests that ran: replay computes them again from their known tokens, fail ends them",
        choices=("replay", "fail"),
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "pipeline_parallel_size", "cpu_threads")
        check_at_least(self, 0, "max_stage_restarts")
        parse_layer_partition(self.pipeline_layer_partition, self.pipeline_parallel_size)
        parse_stage_cpus(self.stage_cpus, self.pipeline_parallel_size)
        parse_stage_devices(self.stage_devices, self.pipeline_parallel_size)
        check_pipeline_address(self.pipeline_address)
        if self.pipeline_address is not None and self.pipeline_key is None:
            raise ConfigError("pipeline_key", None, "a key file: nothing is open to other hosts without one")
        if parse_remote_stages(self.remote_stages, self.pipeline_parallel_size):
            if self.pipeline_address is None:
                raise ConfigError("pipeline_address", None, "one, for remote_stages to join at")
            if self.executor not in ("auto", "zmq"):
                raise ConfigError("executor", self.executor, "auto or zmq with remote_stages")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    """What is kept of the steps that were run."""

    trace: str | None = option(None, "write a step trace here at the end; Perfetto opens it, and llm-engine trace")
    trace_steps: int = option(100_000, "steps the trace holds, the last ones; about a kilobyte of memory each")
    metrics_tenants: int = option(
        16, "tenants with metrics of their own, the first that come; the rest count as other; 0: none by tenant"
    )
    metrics_priorities: int = option(
        16, "priorities with metrics of their own, the first that come; the rest count as other; 0: none by priority"
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "trace_steps")
        check_at_least(self, 0, "metrics_tenants", "metrics_priorities")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine is built from. ``EngineConfig.of(model=..., max_num_seqs=...)`` sorts flat names."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    @classmethod
    def of(cls, **flat: Any) -> EngineConfig:
        """Build from flat field names; raises ``ConfigError`` for an unknown one, with the nearest known name."""
        owners = {f.name: part for part in PARTS for f in fields(PARTS[part])}
        sorted_out: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for name, value in flat.items():
            if name not in owners:
                close = difflib.get_close_matches(name, owners, n=1)
                raise ConfigError(name, value, "no such setting" + (f"; did you mean {close[0]!r}?" if close else ""))
            sorted_out[owners[name]][name] = value
        return cls(**{part: PARTS[part](**values) for part, values in sorted_out.items()})


class EngineSettings(TypedDict, total=False):
    """The flat names of ``EngineConfig.of`` but for ``model`` and ``resources``, which ``LLM`` takes by itself; for the
    type checkers of those who embed the engine."""

    tokenizer: str | None
    revision: str | None
    download_dir: str | None
    dtype: str
    max_model_len: int | None
    device: str
    seed: int
    block_size: int | None
    num_kv_blocks: int | None
    kv_cache_memory: int | None
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    kv_cache_manager: str
    scheduler: str
    ordering: str | None
    capacity: str | None
    micro_batch: str | None
    scheduler_options: Mapping[str, Any] | None
    max_num_seqs: int
    max_micro_batch_seqs: int | None
    max_num_batched_tokens: int | None
    long_prefill_token_threshold: int | None
    chunk_unit: int | None
    max_num_waiting: int | None
    num_queues: int | None
    schedule_ahead: bool
    pipeline_parallel_size: int
    executor: str
    cpu_threads: int | None
    pipeline_layer_partition: str | None
    stage_cpus: str
    stage_devices: str | None
    pipeline_address: str | None
    pipeline_key: str | None
    remote_stages: str | None
    max_stage_restarts: int
    on_stage_death: str
    trace: str | None
    trace_steps: int
    metrics_tenants: int
    metrics_priorities: int


PARTS: Mapping[str, type[Any]] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
    "observability": ObservabilityConfig,
}


def check_choices(config: Any) -> None:
    """Raise ``ConfigError`` for a field outside its ``choices``."""
    for f in fields(config):
        choices = f.metadata.get("choices")
        if choices and getattr(config, f.name) not in choices:
            raise ConfigError(f.name, getattr(config, f.name), ", ".join(choices))


_INT, _FLOAT = (int,), (int, float)
_TYPES: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: (_INT, "a whole number"),
    float: (_FLOAT, "a number"),
    str: ((str,), "a text"),
}


def check_types(config: Any) -> None:
    """Raise ``ConfigError`` for a field whose value is not of the plain type it is declared with; others pass."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if value is None and NoneType in kinds:
            continue
        accepted, allowed = _TYPES.get(kinds[0], ((object,), ""))
        if not isinstance(value, accepted) or (isinstance(value, bool) and accepted in (_INT, _FLOAT)):
            raise ConfigError(name, value, allowed)


def check_options(options: Any) -> None:
    """Raise ``ConfigError`` for options of a scheduler that are no names with plain values."""
    if options is None:
        return
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ConfigError("scheduler_options", options, "names with their values")
    for name, value in options.items():
        if not isinstance(value, bool | int | float | str | list | tuple | NoneType):
            raise ConfigError(
                f"scheduler_options[{name!r}]", value, "a number, true or false, text, or a list of these"
            )


def check_at_least(config: Any, low: int, *names: str) -> None:
    """Raise ``ConfigError`` for an integer field below ``low``, or of another type; ``None`` passes where allowed."""
    check_types(config)
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(name, value, f"a whole number of {low} or more")
