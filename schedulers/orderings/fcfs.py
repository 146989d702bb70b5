"""First come, first served; a paused request keeps the place of its arrival."""

from __future__ import annotations

from ...core.views import RequestView
from .by_key import KeyedOrdering


class FcfsOrdering(KeyedOrdering):
    """Visits by request id, which rises with arrival; of the residents, the youngest is paused."""

    def key(self, request: RequestView) -> int:
        return 0  # all are equal, and ties go by arrival
