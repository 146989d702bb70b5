"""Admit a batch, let all of it end, admit the next: what batching was before requests could join a running one.

The rule of TensorRT-LLM's STATIC_BATCH: as guaranteed-no-evict, but only into an empty batch, and without the delay of
duplicate prefixes, which would leave a duplicate to the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...core.step import StepPlan
from ...core.views import RequestView
from ..base import Verdict
from ..scheduling_pass import SchedulingPass
from .guaranteed_no_evict import GuaranteedNoEvict, GuaranteedNoEvictOptions


class StaticBatch(GuaranteedNoEvict):
    """A batch is open from its first plan until that comes back, not in one pass only: several stages hold several
    micro-batches, and those pushed behind the first would otherwise be empty. It closes with all whom the passes until
    then have admitted; the next opens when every one of them has ended."""

    Options = None

    def __init__(self) -> None:
        super().__init__(GuaranteedNoEvictOptions(defer_duplicates=False))
        self._members: dict[int, None] = {}
        self._opening: set[int] | None = set()
        """Who was admitted since the batch opened; ``None`` once it is closed."""

    def started(self, request: RequestView) -> None:
        super().started(request)
        self._members[request.request_id] = None
        if self._opening is not None:
            self._opening.add(request.request_id)

    def ended(self, request_id: int) -> None:
        super().ended(request_id)
        if request_id in self._members:
            del self._members[request_id]
            if not self._members:
                self._opening = set()

    def retired(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        if self._opening is not None and not self._opening.isdisjoint(plan.chunk_ids):
            self._opening = None

    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        return Verdict.STOP if self._opening is None else super().judge(step, request)
