"""Running queues filled by hand, to begin a simulation in the middle of a load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.request import Request
from ..core.step import StepPlan, StepResult
from ..core.views import RequestView, TableView
from ..engine.core import EngineCore
from ..kvcache.view import KVView


def seat(core: EngineCore, queue: int, requests: Sequence[Request]) -> None:
    """Make these requests decodes of a running queue: their prompts are computed at time 0, by plans that never leave.

    The core must be idle but for what was seated before. Raises ``SchedulerError`` where they do not fit.
    """
    scheduler, limits = core.scheduler, core.limits
    usher = _Usher()
    core.scheduler = usher  # type: ignore[assignment]
    try:
        for request in requests:
            core.add(request, 0.0)
            for start in range(0, request.num_prompt_tokens, limits.max_num_batched_tokens):
                size = min(limits.max_num_batched_tokens, request.num_prompt_tokens - start)
                usher.plan = StepPlan(queue=queue, chunk_ids=[request.request_id], chunk_tokens=[size])
                plan = core.schedule(0.0)
                assert plan is not None
                core.retire(StepResult(plan.epoch, plan.step, [0] * plan.num_sampled), 0.0)
    finally:
        core.scheduler = scheduler


class _Usher:
    """A scheduler that does as it is told."""

    has_work = True
    plan: StepPlan | None = None

    def add(self, request: RequestView) -> None:
        """It will be told."""

    def abort(self, request_id: int) -> None:
        """Nobody is remembered."""

    def schedule(self, now: float, table: TableView, kv: KVView) -> StepPlan | None:
        return self.plan

    def update(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        """Nothing is learnt."""
