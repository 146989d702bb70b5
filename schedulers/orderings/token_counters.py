"""How much of the engine's work each tenant has had, in weighted tokens: virtual token counters.

Every answer grows a token a step, so counting them as they come would be a loop over all residents in every step.
Here each resident is looked at from time to time, its known tokens against those counted, and once more when it ends or
is paused; nothing at all is done while nobody asks.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...core.views import RequestView
from .fcfs import FcfsOrdering

_LOOKS_PER_STEP = 8
"""Residents that may be looked at for each step that came back; with more of them, a look at all is rarer."""
_MAX_STEPS = 64
"""Steps after which all are looked at, however many they are."""
_MAX_GONE = 1024
"""Tenants with nothing in the engine that may become known before those of them who owe nothing are forgotten."""


class Tenant:
    """One tenant's counter, and who of them waits."""

    __slots__ = ("listed", "name", "num_resident", "served", "since", "waiting", "weight")

    def __init__(self, name: str | None, weight: float) -> None:
        self.name, self.weight = name, weight
        self.served = 0.0
        """Weighted tokens so far, over the tenant's weight; it only rises."""
        self.waiting = FcfsOrdering()
        self.since = 0
        """Which in turn they were to begin waiting; ties go by it."""
        self.num_resident = 0
        self.listed = False
        """For the owner of the turns: whether they stand in its list."""

    @property
    def is_gone(self) -> bool:
        return not self.num_resident and not len(self.waiting)


class _Resident:
    __slots__ = ("counted", "request", "tenant")

    def __init__(self, request: RequestView, tenant: Tenant) -> None:
        self.request, self.tenant = request, tenant
        self.counted = request.num_output_tokens


class TokenCounters:
    """Tenants by name, and what their residents have been given."""

    def __init__(self, weights: Mapping[str, float], prompt_weight: float, output_weight: float) -> None:
        self._weights = weights
        self._prompt_weight, self._output_weight = prompt_weight, output_weight
        self._tenants: dict[str | None, Tenant] = {}
        self._residents: dict[int, _Resident] = {}
        self._newcomers: list[_Resident] = []
        """Started since the last look: what they found in the prefix cache is known once their plan is booked."""
        self.num_settled = 0
        """How often the counters were brought up to date and may have moved."""
        self._num_steps = 0
        """Steps that came back since all residents were looked at."""
        self._tidy_at = _MAX_GONE

    def __len__(self) -> int:
        """Tenants it knows."""
        return len(self._tenants)

    def tenant(self, name: str | None) -> Tenant:
        """The tenant of this name, now known."""
        tenant = self._tenants.get(name)
        if tenant is None:
            weight = 1.0 if name is None else self._weights.get(name, 1.0)
            tenant = self._tenants[name] = Tenant(name, weight)
        return tenant

    def find(self, name: str | None) -> Tenant | None:
        """The tenant of this name, if it is known."""
        return self._tenants.get(name)

    def price(self, request: RequestView, num_cached: int, tenant: Tenant) -> float:
        """What a start adds to the counter: its prompt, less what it finds in the cache. To recompute what was paused
        is the engine's doing and free."""
        if request.num_preemptions:
            return 0.0
        return self._prompt_weight * (request.num_prompt_tokens - num_cached) / tenant.weight

    def start(self, request: RequestView) -> None:
        resident = _Resident(request, self.tenant(request.tenant))
        resident.tenant.num_resident += 1
        self._residents[request.request_id] = resident
        if not request.num_preemptions:
            self._newcomers.append(resident)

    def leave(self, request_id: int) -> None:
        """A resident ended or was paused; others are ignored."""
        resident = self._residents.pop(request_id, None)
        if resident is not None:
            self._count(resident)
            resident.tenant.num_resident -= 1

    def step_back(self) -> None:
        """A step came back."""
        self._num_steps += 1

    def settle(self) -> None:
        """Bring the counters up to date, or nearly: an answer may have grown by as many tokens as steps came back since
        all were looked at."""
        if self._newcomers:
            for newcomer in self._newcomers:
                num_cached = newcomer.request.num_cached_tokens or 0
                newcomer.tenant.served += self.price(newcomer.request, num_cached, newcomer.tenant)
            self._newcomers.clear()
            self.num_settled += 1
        if self._num_steps and self._num_steps >= min(_MAX_STEPS, len(self._residents) // _LOOKS_PER_STEP):
            self._num_steps = 0
            self.num_settled += 1
            for resident in self._residents.values():
                self._count(resident)

    def tidy(self, level: float) -> None:
        """Forget tenants that are gone: they would come back with ``level``, where they have had no more. Of those that
        have, the ones who owe least, down to half of the limit."""
        if len(self._tenants) <= self._tidy_at:
            return
        gone = sorted((t for t in self._tenants.values() if t.is_gone), key=lambda tenant: tenant.served)
        for number, tenant in enumerate(gone):
            if tenant.served <= level or len(gone) - number > _MAX_GONE // 2:
                del self._tenants[tenant.name]
        self._tidy_at = len(self._tenants) + _MAX_GONE

    def _count(self, resident: _Resident) -> None:
        num_output, tenant = resident.request.num_output_tokens, resident.tenant
        if num_output != resident.counted:
            tenant.served += self._output_weight * (num_output - resident.counted) / tenant.weight
            resident.counted = num_output
