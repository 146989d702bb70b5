"""Most of its prompt in the prefix cache first, among those who came first.

The cache-aware policy of SGLang (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs",
NeurIPS 2024; ``--schedule-policy lpm`` there): whoever finds the longest prefix goes while it is still cached, so that
requests with one prefix run together instead of evicting each other's by turns. Two bounds:

- Only the first ``window`` by arrival are compared; those behind follow by arrival. SGLang gives up and goes by arrival
  altogether while more than 128 wait. The cost is bounded either way, but much waits just when memory is short, and
  then the order is worth most.
- The oldest is overtaken at most ``max_overtaken`` times in a row, then it goes first. So nobody waits for more than
  ``max_overtaken`` + 1 times as many starts as by arrival, however well others match. SGLang has no such bound.

Of several who wait with the same new prefix, capacity admits one and defers the others until they find it
(``SchedulingPass.is_being_computed``); SGLang sends them behind in its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ...core.config import check_types, option
from ...core.errors import ConfigError
from ...core.views import RequestView
from ..scheduling_pass import SchedulingPass
from .fcfs import FcfsOrdering

_MAX_WINDOW = 1024
"""Each that is compared is looked at whenever somebody is to be admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongestPrefixOptions:
    """How far the cache may change the order of arrival."""

    window: int = option(128, "waiting requests that are compared, the first by arrival; the others go by arrival")
    max_overtaken: int = option(16, "times in a row that the oldest may be overtaken, then it goes first")

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.window <= _MAX_WINDOW:
            raise ConfigError("window", self.window, f"a whole number from 1 to {_MAX_WINDOW}")
        if self.max_overtaken < 0:
            raise ConfigError("max_overtaken", self.max_overtaken, "a whole number of 0 or more")


class LongestPrefixOrdering(FcfsOrdering):
    """By cached tokens, the most first, ties by arrival."""

    Options = LongestPrefixOptions

    def __init__(self, options: LongestPrefixOptions | None = None) -> None:
        super().__init__()
        options = options or LongestPrefixOptions()
        self._window, self._max_overtaken = options.window, options.max_overtaken
        self._oldest: int | None = None
        self._num_overtaken = 0
        """Starts of others since that one is the oldest that waits."""

    def visit(self, step: SchedulingPass) -> Iterator[RequestView]:
        everybody = super().visit(step)
        if step.seats_left > 0 and len(self) > 1:  # else nobody can start, and nothing is looked up for that
            front = list(islice(everybody, self._window))
            ranked = sorted(front, key=lambda request: -step.prefix(request).num_tokens)
            yield from self._with_bound(ranked, front)
        yield from everybody

    def _with_bound(self, ranked: list[RequestView], by_age: list[RequestView]) -> Iterator[RequestView]:
        """The ranked, and the oldest before they are overtaken too often; as if each that is visited started."""
        told: set[int] = set()
        ages = iter(by_age)
        oldest = next(ages)
        overtaken = self._num_overtaken if oldest.request_id == self._oldest else 0
        for request in ranked:
            while request.request_id not in told:
                turn = oldest if overtaken >= self._max_overtaken else request
                told.add(turn.request_id)
                yield turn
                overtaken += 1
                while oldest.request_id in told:
                    following = next(ages, None)
                    if following is None:
                        return
                    oldest, overtaken = following, 0

    def started(self, request: RequestView) -> None:
        """A start out of turn counts against whoever is the oldest now."""
        oldest = next(iter(self._places), None)
        if oldest is None or request.request_id < oldest[1]:
            return
        if oldest[1] != self._oldest:
            self._oldest, self._num_overtaken = oldest[1], 0
        self._num_overtaken += 1
