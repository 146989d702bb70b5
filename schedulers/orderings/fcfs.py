"""First come, first served; a paused request keeps the place of its arrival."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from ...core.views import RequestView
from ..base import Ordering
from ..scheduling_pass import SchedulingPass


class FcfsOrdering(Ordering):
    """Visits by request id, which rises with arrival. The list is kept sorted: newcomers append, the paused insert."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._requests: dict[int, RequestView] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, request: RequestView) -> None:
        self._ids.insert(bisect_left(self._ids, request.request_id), request.request_id)
        self._requests[request.request_id] = request

    def remove(self, request_id: int) -> None:
        if self._requests.pop(request_id, None) is not None:
            del self._ids[bisect_left(self._ids, request_id)]

    def visit(self, step: SchedulingPass) -> Iterator[RequestView]:
        for request_id in self._ids:
            yield self._requests[request_id]
