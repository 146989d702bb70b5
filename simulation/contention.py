"""How evenly tenants are served while they compete."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from .run import Served


class Contention:
    """Until when tenants compete: while requests come or, where all come at once, until one has all it asked for.

    Afterwards the service a tenant got tells nothing: in the end everybody has everything.
    """

    def __init__(self, requests: Sequence[Served]) -> None:
        tenants = Counter(served.tenant for served in requests)
        first = min((served.arrival for served in requests), default=0.0)
        last = max((served.arrival for served in requests), default=0.0)
        self.ends_at = last if len(tenants) > 1 and last > first else math.inf
        self._left = tenants if len(tenants) > 1 and last == first else Counter[str | None]()

    def ended(self, served: Served, now: float) -> None:
        """A request has all it asked for."""
        if self._left:
            self._left[served.tenant] -= 1
            if not self._left[served.tenant]:
                self.ends_at = now
                self._left.clear()


def fair_shares(demands: Mapping[str | None, float], total: float) -> dict[str | None, float]:
    """``total`` in max-min fair shares: nobody gets more than demanded; what one leaves, the others share evenly."""
    shares: dict[str | None, float] = {}
    left = total
    for index, (tenant, demand) in enumerate(sorted(demands.items(), key=lambda item: (item[1], str(item[0])))):
        shares[tenant] = min(demand, left / (len(demands) - index))
        left -= shares[tenant]
    return shares


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 where all are equal, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def fairness(requests: Sequence[Served], tokens: Mapping[str | None, int]) -> float | None:
    """Jain's index of what each tenant got over its max-min fair share of what all got: 1 where a tenant that asks for
    little has got it, and those that ask for more have got the rest in equal parts. ``None`` for fewer than two."""
    demands = Counter[str | None]()
    for served in requests:
        demands[served.tenant] += served.num_tokens_asked
    if len(demands) < 2 or not tokens:
        return None
    shares = fair_shares(demands, sum(tokens.values()))
    return jain([tokens.get(tenant, 0) / share if share else 1.0 for tenant, share in shares.items()])
