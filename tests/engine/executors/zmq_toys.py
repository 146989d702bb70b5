"""Executors of toy stage processes, for tests of what they do beside the contract."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from llm_engine.core.config import EngineConfig
from llm_engine.core.step import StepResult
from llm_engine.engine.executors.registry import ExecutorSpec, make_zmq
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from llm_engine.workers.model_engine import ModelInfo, Progress
from tests.plans import Planner
from tests.toy_model_engine import ToyModelEngine, expected_tokens
from tests.toy_stages import make_stage

SECONDS = 20.0
"""Long enough for anything that comes at all."""


class Endless(ToyModelEngine):
    """Stage 0 loads for a minute, and its process is well meanwhile."""

    def load(self, progress: Progress | None = None) -> ModelInfo:
        if self.stage == 0:
            threading.Event().wait(60)
        return super().load(progress)


def toy_executor(
    num_stages: int = 2, *, progress: Callable[[int, int], None] | None = None, **settings: Any
) -> ZmqExecutor:
    """Not started yet. ``tests.toy_stages.tell_stages`` says what its stages do."""
    settings = {"max_num_seqs": 8, "num_kv_blocks": 64, "block_size": 4, **settings}
    config = EngineConfig.of(pipeline_parallel_size=num_stages, **settings)
    executor = make_zmq(ExecutorSpec(config, make_stage, block_size=settings["block_size"], progress=progress))
    assert isinstance(executor, ZmqExecutor)
    return executor


def check_tokens(executor: ZmqExecutor, epoch: int = 0, prompt: Sequence[int] = (3, 1, 4, 1, 5)) -> list[StepResult]:
    """Run one prompt to its third token; the results."""
    planner, results = Planner(), []
    request = planner.add(prompt)
    for count in (len(prompt), 1, 1):
        plan = planner.plan({1: count})
        plan.epoch = epoch
        executor.push(plan)
        result = executor.collect(SECONDS)
        assert isinstance(result, StepResult), result
        planner.enter(plan, result)
        results.append(result)
    assert request.outputs == expected_tokens(prompt, 3)
    return results


def stage_pids(executor: ZmqExecutor) -> list[int]:
    """Of the stages on this host."""
    assert executor._group is not None
    return [stage.process.pid for stage in executor._group.stages if stage.process is not None]


def children() -> set[int]:
    """Processes that this one has started and that are still there."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
