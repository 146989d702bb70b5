"""Admit a batch, let all of it end, admit the next: what batching was before requests could join a running one.

The rule of TensorRT-LLM's STATIC_BATCH: as guaranteed-no-evict, but only into an empty batch, and without the delay of
duplicate prefixes. There a batch is whom one pass has the budget for; here it is all who fit when the engine is empty,
and they start as the budget allows.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...core.views import RequestView
from ..base import Ordering, Verdict
from ..scheduling_pass import SchedulingPass
from .guaranteed_no_evict import GuaranteedNoEvict, GuaranteedNoEvictOptions


class StaticBatch(GuaranteedNoEvict):
    """A batch is chosen among those who wait when nobody is resident: in visiting order, up to the first that finds no
    seat or no memory to grow in. So every stage of a pipeline has its part of it. The next is chosen when all have
    ended; who comes meanwhile waits for that."""

    Options = None

    def __init__(self) -> None:
        super().__init__(GuaranteedNoEvictOptions(defer_duplicates=False))
        self._chosen: dict[int, RequestView] = {}
        """Who is still to start."""

    def make_way(self, step: SchedulingPass, waiting: Ordering) -> None:
        """Chooses a batch where there is none."""
        if step.table.num_resident or self._chosen:
            return
        room, seats = self.room(step), step.seats_left
        for request in waiting.visit(step):
            needed = step.blocks_to_end(request)
            if needed > room or len(self._chosen) == seats:
                break
            if step.lacking_resource(request) is None:
                step.set_aside_resources(request)
                self._chosen[request.request_id] = request
                room -= needed
        step.forget_set_aside()

    def candidates(self, step: SchedulingPass, waiting: Ordering) -> Iterator[RequestView]:
        """Who is still to start, however many come before them by now."""
        return iter(self._chosen.values()) if self._chosen else waiting.visit(step)

    def started(self, request: RequestView) -> None:
        super().started(request)
        self._chosen.pop(request.request_id, None)

    def ended(self, request_id: int) -> None:
        super().ended(request_id)
        self._chosen.pop(request_id, None)

    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        if not self._chosen:
            return Verdict.STOP
        return super().judge(step, request) if request.request_id in self._chosen else Verdict.SKIP
