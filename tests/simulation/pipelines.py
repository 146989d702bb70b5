"""Small simulations to look at: costs in whole seconds, books as an engine has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_engine.core.config import EngineConfig
from llm_engine.core.cost_model import LinearCost, StepShape
from llm_engine.engine.assembly import make_core
from llm_engine.simulation.links import LINKS, Link
from llm_engine.simulation.pipeline import Pipeline
from llm_engine.simulation.simulator import HostCost, Simulator

NOTHING = LINKS["none"]
FREE = HostCost(0.0, 0.0)


def shape(num_tokens: int) -> StepShape:
    return StepShape(num_tokens, num_tokens, num_tokens, num_tokens, num_tokens)


def constant(seconds: float) -> LinearCost:
    return LinearCost(seconds, 0.0)


def simulator(
    seconds: Sequence[float] = (1.0,),
    *,
    link: Link = NOTHING,
    per_token: float = 0.0,
    per_context: float = 0.0,
    activation_bytes: float = 0.0,
    host: HostCost = FREE,
    num_kv_blocks: int = 1000,
    block_size: int = 4,
    keep_stats: int = 0,
    **settings: Any,
) -> Simulator:
    """Stages of so many seconds a step, ``per_token`` more for each token, ``per_context`` for each one before it.
    ``settings`` are the engine's."""
    settings = {"scheduler": "greedy", "schedule_ahead": False, "max_num_batched_tokens": 64} | settings
    core = make_core(
        EngineConfig.of(**settings),
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        num_stages=len(seconds),
        on_cuda=True,
    )
    costs = [LinearCost(base, per_token, per_context) for base in seconds]
    pipeline = Pipeline(costs, link, activation_bytes=activation_bytes)
    return Simulator(core, pipeline, host, keep_stats=keep_stats)
