"""Earliest deadline first; what cannot make its own any more is shed.

The deadline-driven rule of Liu and Layland (1973), without displacing residents. Where not all can be in time it would
serve just those that are about to fail, so whoever cannot make it is ended with ``RequestShedError`` while it waits,
and its time goes to those who can.

A request without a deadline counts as due ``default_deadline_ms`` after its arrival, so it waits for a bounded time;
it is never shed. Nor is one that has output already: its caller has been reading it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...core.config import check_types, option
from ...core.errors import ConfigError
from ...core.step import StepPlan
from ...core.views import RequestView
from .by_key import KeyedOrdering
from .service_pace import Pace, ServicePace

_SPARE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineOptions:
    """What becomes of those who cannot make it, and of those who have no deadline."""

    shed: bool = option(True, "end waiting requests that cannot make their deadline, at the best pace seen of late")
    default_deadline_ms: float = option(60_000.0, "where a request without a deadline stands among the others")

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.default_deadline_ms < float("inf"):
            raise ConfigError("default_deadline_ms", self.default_deadline_ms, "a number above 0")


class DeadlineOrdering(KeyedOrdering):
    """Sorted by deadline; beside it, a heap of those that may be shed, by when they would have to start at the latest.

    The heap holds entries of requests that have left, until they come up or outnumber the waiting; it is built anew
    when the pace has changed.
    """

    Options = DeadlineOptions
    knows: ClassVar[frozenset[str]] = frozenset({"deadline_ms"})

    def __init__(self, options: DeadlineOptions | None = None) -> None:
        super().__init__()
        options = options or DeadlineOptions()
        self._sheds, self._default_s = options.shed, options.default_deadline_ms / 1000
        self._service = ServicePace()
        self._now = 0.0
        self._pace = Pace()
        """With which the heap was built."""
        self._latest_starts: list[tuple[float, int]] = []
        self._sheddable: dict[int, RequestView] = {}

    def key(self, request: RequestView) -> float:
        return request.arrival + self._default_s if request.deadline is None else request.deadline

    def add(self, request: RequestView) -> None:
        super().add(request)
        self._service.waits_again(request.request_id)
        if self._sheds and request.deadline is not None and not request.num_output_tokens:
            self._sheddable[request.request_id] = request
            heapq.heappush(self._latest_starts, self._latest_start(request))

    def remove(self, request_id: int) -> None:
        super().remove(request_id)
        self._sheddable.pop(request_id, None)

    def started(self, request: RequestView) -> None:
        self._service.started(request, self._now)

    def ended(self, request_id: int) -> None:
        self._service.ended(request_id)

    def retired(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        self._service.retired(plan, finished_ids)

    def shed(self, now: float) -> Iterable[tuple[RequestView, str]]:
        self._now = now
        self._service.tick(now)
        outnumbered = len(self._latest_starts) > 2 * len(self._sheddable) + _SPARE
        if self._service.best != self._pace or outnumbered:
            self._pace = self._service.best
            self._latest_starts = [self._latest_start(request) for request in self._sheddable.values()]
            heapq.heapify(self._latest_starts)
        if not self._latest_starts or self._latest_starts[0][0] >= now:
            return ()
        return list(self._take_late(now))

    def _latest_start(self, request: RequestView) -> tuple[float, int]:
        assert request.deadline is not None
        return request.deadline - self._pace.seconds_for(request), request.request_id

    def _take_late(self, now: float) -> Iterator[tuple[RequestView, str]]:
        while self._latest_starts and self._latest_starts[0][0] < now:
            _, request_id = heapq.heappop(self._latest_starts)
            request = self._sheddable.pop(request_id, None)
            if request is not None:
                yield request, self._reason(request, now)

    def _reason(self, request: RequestView, now: float) -> str:
        assert request.deadline is not None
        # To the microsecond: on a clock that runs since the host was started, days ago, the difference is no finer.
        asked = f"deadline_ms {round((request.deadline - request.arrival) * 1000, 3):g}"
        if request.deadline < now:
            return f"{asked} passed while it waited"
        left, needed = request.deadline - now, self._pace.seconds_for(request)
        return (
            f"{asked} cannot be met: {left * 1000:.0f} ms are left and at the best pace of late it takes "
            f"{needed * 1000:.0f} ms"
        )
