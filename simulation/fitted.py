"""A step trace of a real run, as the stages of a simulation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..metrics.step_trace import read_trace
from .fit import FittedPipeline, fit
from .links import Link
from .simulator import HostCost

ANY_LENGTH = 1 << 24
"""The context of a model that a trace does not tell."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was fitted, and what else the trace told of its run."""

    pipeline: FittedPipeline
    model: str
    layers_per_stage: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    max_num_batched_tokens: int | None
    max_model_len: int = ANY_LENGTH
    on_cuda: bool = False
    sliding_window: int | None = None
    not_told: str = ""
    """What had to be assumed, in words to go behind a sentence."""

    @property
    def link(self) -> Link:
        """Between stages, for messages of a byte per token."""
        return self.pipeline.delays.link

    @property
    def host(self) -> HostCost:
        return self.pipeline.delays.host

    def blocks_of(self, block_size: int) -> int:
        """The pool in blocks of another size, block 0 beside. Raises ``ConfigError`` where not one fits."""
        num_tokens = (self.num_kv_blocks - 1) * self.block_size
        if num_tokens < block_size:
            raise ConfigError("block_size", block_size, f"at most the {num_tokens} tokens of the trace's pool")
        return 1 + num_tokens // block_size

    def with_its_limits(self, engine: EngineConfig) -> EngineConfig:
        """The settings, with the trace's token budget where none was told."""
        if engine.scheduler.max_num_batched_tokens is not None or self.max_num_batched_tokens is None:
            return engine
        budget = self.max_num_batched_tokens
        return replace(engine, scheduler=replace(engine.scheduler, max_num_batched_tokens=budget))


def read_fit(path: str) -> Fitted:
    """Raises ``ConfigError`` for a file that is not there, is no step trace or does not tell enough."""
    try:
        trace = read_trace(path)
    except ConfigError as error:
        raise ConfigError("fit", path, error.allowed) from error
    about = trace.metadata
    if about.num_kv_blocks is None or about.block_size is None:
        raise ConfigError("fit", path, "a trace that tells its pool: of this version of llm-engine")
    return Fitted(
        fit(trace.records, about.layers_per_stage),
        about.model,
        about.layers_per_stage,
        about.num_kv_blocks,
        about.block_size,
        about.limits.get("max_num_batched_tokens"),
        about.max_model_len or ANY_LENGTH,
        bool(about.on_cuda),
        about.sliding_window,
        "" if about.on_cuda is not None else "; it does not tell its device and window: a CPU and none are taken",
    )
