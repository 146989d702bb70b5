"""Engines over the toy model, and ways to hold them at a chosen moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_engine import LLM, SamplingParams
from llm_engine.core.outputs import RequestOutput
from llm_engine.core.step import StepPlan
from llm_engine.engine.engine import Engine
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from llm_engine.workers.batch import StageBatch
from tests.toy_model_engine import OnForward, ToyModelEngine

SECONDS = 20.0
"""Long enough for anything that comes at all."""


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)


def toy_llm(*, stages: int = 1, on_forward: OnForward | None = None, eos: Sequence[int] = (), **settings: Any) -> LLM:
    """``on_forward`` is the first stage's hook."""
    settings = {"num_kv_blocks": 200, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}

    def make(stage: int) -> ToyModelEngine:
        return ToyModelEngine(stage, stages, eos_token_ids=eos, on_forward=on_forward if stage == 0 else None)

    return LLM(model_engine=make, pipeline_parallel_size=stages, **settings)


class StageDeath(BaseException):
    """What no stage survives: it is no ``Exception``."""


class Valve:
    """An ``on_forward`` hook that holds every forward until one is let through, or the stage is killed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets = 0
        self._open = False
        self._lethal = False
        self.arrived = 0
        """Forwards that have reached the valve."""

    def __call__(self, number: int, batch: StageBatch) -> None:
        with self._changed:
            self.arrived += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._tickets or self._open or self._lethal, SECONDS)
            if self._lethal:
                raise StageDeath("the stage was killed")
            if not self._open:
                self._tickets -= 1

    def await_arrival(self, number: int) -> None:
        """Until so many forwards have reached it."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.arrived >= number, SECONDS), self.arrived

    def let_through(self) -> None:
        with self._changed:
            self._tickets += 1
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def kill(self) -> None:
        with self._changed:
            self._lethal = True
            self._changed.notify_all()

    def heal(self) -> None:
        """The next stage that comes lives."""
        with self._changed:
            self._lethal = False


class Commanded(Scheduler):
    """The default scheduler, except for whom it is told to leave alone or to pause; told under the state lock.

    It leaves nobody alone when nothing else runs, which would leave them alone for ever.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)
        self.held: set[int] = set()
        self.to_pause: set[int] = set()

    def schedule(self, now: float, table: Any, kv: Any) -> StepPlan | None:
        for request_id in sorted(self.to_pause):
            if request_id not in table or not table[request_id].is_resident:
                self.to_pause.discard(request_id)
            elif not table.is_in_flight(table[request_id]):
                self.to_pause.discard(request_id)
                self.ordering.add(table[request_id])
                return StepPlan(queue=0, paused_ids=[request_id])
        only_held: StepPlan | None = None
        for queue in table.idle_queues():
            plan = self._plan_for(queue, now, table, kv)
            if plan is not None:
                wanted, plan.decode_ids = plan.decode_ids, [i for i in plan.decode_ids if i not in self.held]
                if plan.num_rows or plan.paused_ids:
                    return plan
                plan.decode_ids, only_held = wanted, plan
        return only_held if all(queue.idle for queue in table.queues) else None


def await_true(condition: Callable[[], bool]) -> None:
    """For what announces itself nowhere."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.0005)


def await_state(engine: Engine, condition: Callable[[], bool]) -> None:
    """Until the books say so; the condition is asked under the state lock."""

    def ask() -> bool:
        with engine.state.changed:
            return condition()

    await_true(ask)


def engine_threads(engine: Engine) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(engine.name + "-")]


def tokens_of(output: RequestOutput, choice: int = 0) -> list[int]:
    return output.outputs[choice].token_ids
