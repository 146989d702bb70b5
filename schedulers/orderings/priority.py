"""The most urgent first; they displace the less urgent, and who waits rises slowly.

The lower number first, ties by arrival, is vLLM's priority policy; aging is the classic remedy of operating systems
(Silberschatz et al., Operating System Concepts, "Priority Scheduling"). A request that has waited ``aging_s`` seconds
counts as one step more urgent:

    urgency(now) = priority - (now - arrival) / aging_s

All rise at the same rate, so who is before whom never changes: ``priority + arrival / aging_s`` is sorted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...core.config import check_types, option
from ...core.errors import ConfigError
from ...core.views import RequestView
from .by_key import KeyedOrdering

_MIN_AGING_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityOptions:
    """How fast who waits becomes urgent."""

    aging_s: float = option(
        300.0, "seconds since its arrival that make a request one priority step more urgent; 0: none ever do"
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not (self.aging_s == 0 or _MIN_AGING_S <= self.aging_s < float("inf")):
            raise ConfigError("aging_s", self.aging_s, f"0, or a number of at least {_MIN_AGING_S}")


class PriorityOrdering(KeyedOrdering):
    """Lower numbers first, preemptive."""

    Options = PriorityOptions
    knows: ClassVar[frozenset[str]] = frozenset({"priority"})

    def __init__(self, options: PriorityOptions | None = None) -> None:
        super().__init__()
        aging_s = (options or PriorityOptions()).aging_s
        self._per_second = 1.0 / aging_s if aging_s else 0.0

    def key(self, request: RequestView) -> float:
        return request.priority + request.arrival * self._per_second

    def displaces(self, newcomer: RequestView, resident: RequestView, changes: Mapping[str | None, int]) -> bool:
        """Of a lower number, and before it in visiting order too.

        Two strict orders that both hold are a strict order again, so no chain of displacements comes back to where it
        began. The number alone would not do: one that has aged past the newcomer would be visited before it, take the
        place that was cleared, and be displaced again. Nor would the age alone: it wins a place that is free, and takes
        none.
        """
        return newcomer.priority < resident.priority and self.pause_key(newcomer) < self.pause_key(resident)
