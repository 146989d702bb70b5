"""The tenant who has had the least work done goes first, by weight.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Each tenant has a
counter of what was done for them: prompt tokens when a request of theirs is admitted, output tokens as they come, by
weight. The tenant of the least counter is visited first and their own requests by arrival. Nobody's share is reserved,
so nothing idles while somebody waits, and two tenants who both have somebody waiting never drift further apart than
about two of their largest requests, whatever else they send.

- A tenant who had nobody waiting is lifted to the least counter of those who have: idling earns no credit.
- What the prefix cache holds of a prompt is not counted: it was not computed.
- What is computed again after a pause is not counted: the pause was the engine's doing.
- Ours: where memory or seats are full, a newcomer displaces a resident of a tenant who holds several times as many. The
  paper lets it wait until one of theirs ends, and with long answers that is what a greedy tenant's neighbours feel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import ClassVar

from ...core.config import check_types, option
from ...core.errors import ConfigError
from ...core.step import StepPlan
from ...core.views import RequestView
from ..base import Ordering
from ..scheduling_pass import SchedulingPass
from .token_counters import Tenant, TokenCounters

_MAX_STALE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FairOptions:
    """What is counted, and who is to get how much of it."""

    weights: str = option(
        "", "shares of tenants as NAME=NUMBER,NAME=NUMBER: twice the number, twice the tokens; others have 1"
    )
    prompt_weight: float = option(1.0, "what a prompt token counts that was computed")
    output_weight: float = option(2.0, "what an output token counts")
    displace_at: float = option(
        3.0,
        "a newcomer takes the place of a resident whose tenant has had no less and holds more than so many times the "
        "residents that the newcomer's own would, by weight; 0: never",
    )

    def __post_init__(self) -> None:
        check_types(self)
        self.parsed_weights()
        for name in ("prompt_weight", "output_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "a number of 0 or more")
        if self.displace_at != 0 and not 1 <= self.displace_at < math.inf:
            raise ConfigError("displace_at", self.displace_at, "0, or a number of 1 or more")
        if not self.prompt_weight and not self.output_weight:
            raise ConfigError("output_weight", self.output_weight, "more than 0 where prompt_weight is 0")

    def parsed_weights(self) -> dict[str, float]:
        """By tenant. A name may hold ``=``, but no comma, and no blanks around it."""
        weights: dict[str, float] = {}
        for part in filter(None, map(str.strip, self.weights.split(","))):
            name, _, number = (text.strip() for text in part.rpartition("="))
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not name or name in weights or not 0 < weight < math.inf:
                raise ConfigError("weights", self.weights, "NAME=NUMBER,NAME=NUMBER, numbers above 0, each name once")
            weights[name] = weight
        return weights


class FairOrdering(Ordering):
    """Tenants by counter, ties by who began to wait first; of the residents, the youngest of the largest is paused.

    Turns are a heap of counters, and counters only rise. So an entry may be too low, never too high, and is put right
    when it comes to the top: what a settlement raised is sorted again only as far as anybody looks.
    """

    Options = FairOptions
    knows: ClassVar[frozenset[str]] = frozenset({"tenant"})

    def __init__(self, options: FairOptions | None = None) -> None:
        options = options or FairOptions()
        self.counters = TokenCounters(options.parsed_weights(), options.prompt_weight, options.output_weight)
        self._displace_at = options.displace_at
        self._home: dict[int, Tenant] = {}
        """By the id of each request that waits."""
        self._turns: list[tuple[float, int, Tenant]] = []
        """A heap of ``(served, since, tenant)``, one for each tenant that waits, and some for those who did."""
        self._num_tenants = 0
        """Tenants of whom somebody waits."""
        self._num_spells = 0
        self._last: Tenant | None = None
        """Who was the last to have nobody waiting any more."""

    def __len__(self) -> int:
        return len(self._home)

    def add(self, request: RequestView) -> None:
        self.remove(request.request_id)
        self.counters.leave(request.request_id)  # where it was paused
        tenant = self.counters.tenant(request.tenant)
        if not len(tenant.waiting):
            self._begin(tenant)
        tenant.waiting.add(request)
        self._home[request.request_id] = tenant
        self.counters.tidy(self._least())

    def remove(self, request_id: int) -> None:
        tenant = self._home.pop(request_id, None)
        if tenant is None:
            return
        tenant.waiting.remove(request_id)
        if not len(tenant.waiting):
            self._num_tenants -= 1
            self._last = tenant

    def visit(self, step: SchedulingPass) -> Iterator[RequestView]:
        """As if each that is visited were admitted, so that one pass takes turns."""
        self.counters.settle()
        if self._first() is None:
            return
        # The heap is left as it is: a copy of what was looked at grows along its branches.
        turns: list[tuple[float, int, int, Tenant, Iterator[RequestView] | None]] = []
        self._branch(turns, 0)
        while turns:
            served, since, index, tenant, waiting = heappop(turns)
            if waiting is None:
                self._branch(turns, 2 * index + 1)
                self._branch(turns, 2 * index + 2)
                if not len(tenant.waiting):
                    continue
                waiting = tenant.waiting.visit(step)
                if (served, since) != (tenant.served, tenant.since):
                    heappush(turns, (tenant.served, tenant.since, index, tenant, waiting))
                    continue
            request = next(waiting, None)
            if request is not None:
                yield request
                price = self.counters.price(request, step.prefix(request).num_tokens, tenant)
                heappush(turns, (served + price, since, index, tenant, waiting))

    def may_displace(self) -> bool:
        """Nobody displaces another of the same tenant."""
        return self._displace_at > 0 and len(self.counters) > 1

    @property
    def standing(self) -> int:
        """Counters move when they are settled, and when a tenant begins to wait."""
        return self.counters.num_settled + self._num_spells

    def displaces(self, newcomer: RequestView, resident: RequestView, changes: Mapping[str | None, int]) -> bool:
        """With it the newcomer's tenant still holds fewer than the other did without. With n residents of a tenant of
        weight w, each displacement so lowers the sum of n (n + 1) / 2w over the tenants: no chain of them comes back to
        where it began. And with a good distance between, two who are about equal leave each other alone.
        """
        own, other = self.counters.find(newcomer.tenant), self.counters.find(resident.tenant)
        if own is None or other is None or own is other or not self._displace_at or own.served > other.served:
            return False
        theirs, ours = other.num_resident, own.num_resident + 1
        if changes:
            theirs, ours = theirs + changes.get(other.name, 0), ours + changes.get(own.name, 0)
        return theirs / other.weight > self._displace_at * ours / own.weight

    def pause_key(self, request: RequestView) -> tuple[float, int]:
        """The youngest of whoever has had most."""
        self.counters.settle()
        tenant = self.counters.find(request.tenant)
        return 0.0 if tenant is None else tenant.served, request.request_id

    def started(self, request: RequestView) -> None:
        self.counters.start(request)

    def ended(self, request_id: int) -> None:
        self.counters.leave(request_id)

    def retired(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        self.counters.step_back()

    def _begin(self, tenant: Tenant) -> None:
        """The tenant had nobody waiting."""
        self.counters.settle()
        tenant.served = max(tenant.served, self._least())
        self._num_spells += 1
        tenant.since = self._num_spells
        self._num_tenants += 1
        if len(self._turns) > 2 * self._num_tenants + _MAX_STALE:
            self._drop_stale()
        if not tenant.listed:
            tenant.listed = True
            heappush(self._turns, (tenant.served, tenant.since, tenant))

    def _least(self) -> float:
        """The least counter of those who wait or, where nobody does, that of the last who did."""
        tenant = self._first() or self._last
        return 0.0 if tenant is None else tenant.served

    def _first(self) -> Tenant | None:
        """The tenant whose turn it is, with its entry at the top; ``None`` while nobody waits."""
        while self._turns:
            served, since, tenant = self._turns[0]
            if not len(tenant.waiting):
                heappop(self._turns)
                tenant.listed = False
            elif (served, since) != (tenant.served, tenant.since):
                heapreplace(self._turns, (tenant.served, tenant.since, tenant))
            else:
                return tenant
        return None

    def _branch(self, turns: list[tuple[float, int, int, Tenant, Iterator[RequestView] | None]], index: int) -> None:
        if index < len(self._turns):
            served, since, tenant = self._turns[index]
            heappush(turns, (served, since, index, tenant, None))

    def _drop_stale(self) -> None:
        for _, _, tenant in self._turns:
            tenant.listed = bool(len(tenant.waiting))
        self._turns = [entry for entry in self._turns if entry[2].listed]
        heapify(self._turns)
