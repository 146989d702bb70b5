"""Reserve to completion: whoever is admitted finds every block it may ever need, so nobody is paused.

The rule of TensorRT-LLM's GUARANTEED_NO_EVICT: a request is admitted when the blocks it needs to grow as long as it may
fit beside what the residents may still grow to. The first that does not fit holds up everybody behind it; one that
only lacks a resource or whose prefix is being computed is passed over. A block that is shared counts once for all who
hold it, and a hit is credited only where somebody holds it: reusing a block that nobody holds takes it from the free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.config import check_types, option
from ...core.views import RequestView
from ..base import Capacity, Verdict
from ..scheduling_pass import SchedulingPass


@dataclass(frozen=True, slots=True, kw_only=True)
class GuaranteedNoEvictOptions:
    """What may be chosen beside the rule."""

    defer_duplicates: bool = option(True, "a request whose first new block another one is computing waits for the hit")

    def __post_init__(self) -> None:
        check_types(self)


class GuaranteedNoEvict(Capacity):
    """What the residents may grow to is kept as a sum, so a step costs the same however many run.

    The blocks that are not reserved are ``usable + shared - to_end``, with ``to_end`` the sum over the residents of the
    most that each ever holds, and ``shared`` what they save by holding the same blocks. Growth changes none of the
    three. A start adds to ``to_end`` and to ``shared`` what ``judge`` has counted. An end takes at least as much from
    ``to_end`` as from ``shared``, since nobody holds more than it ever may. So they never fall below zero, and as
    ``free = usable + shared - held`` with each holder counted, what is free covers all that residents may still take.
    """

    Options: ClassVar[type[Any] | None] = GuaranteedNoEvictOptions

    def __init__(self, options: GuaranteedNoEvictOptions | None = None) -> None:
        self._defer_duplicates = (options or GuaranteedNoEvictOptions()).defer_duplicates
        self._to_end: dict[int, int] = {}
        """By resident."""
        self._sum = 0
        self._not_summed: dict[int, RequestView] = {}
        """Residents since the last pass: only a pass can tell how many blocks they need."""

    def started(self, request: RequestView) -> None:
        self._not_summed[request.request_id] = request

    def added(self, request: RequestView) -> None:
        self.ended(request.request_id)  # the engine took its blocks back: its step failed, or its stages died

    def ended(self, request_id: int) -> None:
        self._not_summed.pop(request_id, None)
        self._sum -= self._to_end.pop(request_id, 0)

    def make_room(self, step: SchedulingPass, num_blocks: int) -> bool:
        """Pauses nobody. Without a window it is never asked for more than is free; with one, the view's estimate may be
        above what is taken when several residents pass shared blocks at once, and a row then sits one pass out."""
        return step.kv.free_blocks >= num_blocks

    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        unreserved = self.room(step)
        if step.seats_left <= 0 or unreserved <= 0:
            return Verdict.STOP  # whatever it finds in memory, it needs a block
        if self._defer_duplicates and step.is_being_computed(request):
            return Verdict.SKIP
        if step.blocks_to_end(request) - step.kv.shared_by(step.prefix(request)) > unreserved:
            return Verdict.STOP
        if step.lacking_resource(request) is not None:
            return Verdict.SKIP
        return Verdict.ADMIT

    def room(self, step: SchedulingPass) -> int:
        """Blocks that nobody may grow into, those admitted in this pass included."""
        for request_id, request in self._not_summed.items():
            self._to_end[request_id] = blocks = step.blocks_to_end(request)
            self._sum += blocks
        self._not_summed.clear()
        return step.kv.num_usable_blocks + step.kv.shared_blocks - self._sum - step.reserved_blocks

    def need(self, step: SchedulingPass, request: RequestView) -> int:
        return step.blocks_to_end(request) - step.prefix(request).num_blocks
