"""A resource beside KV blocks: at most four requests at a time may hold a licence of some feature they use.

PYTHONPATH=examples llm-engine serve --resource licence_slots:LicenceSlots
"""

from __future__ import annotations

from llm_engine import BaseResourceManager, RequestView, StepPlan


class LicenceSlots(BaseResourceManager):
    """A request holds one from its first step to its end, and gives it back while it is paused."""

    name = "licence slots"

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.held: set[int] = set()

    def needed(self, request: RequestView) -> int:
        return 0 if request.request_id in self.held else 1

    def available(self) -> int:
        return self.count - len(self.held)

    def prepare_resources(self, plan: StepPlan) -> None:
        self.held.update(start.request_id for start in plan.starts)

    def free_resources(self, request: RequestView) -> None:
        self.held.discard(request.request_id)
