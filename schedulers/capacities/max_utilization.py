"""Fill the memory; when it runs short, pause the youngest.

The rule of TensorRT-LLM's MAX_UTILIZATION and of vLLM's scheduler: admission looks at what a request needs now, not at
what it may grow to, and a shortage is met by pausing the resident that arrived last - possibly the one that asks.
A paused request gives all its blocks back and is recomputed later from its known tokens.
"""

from __future__ import annotations

from ...core.views import RequestView
from ..base import Capacity, Verdict
from ..scheduling_pass import SchedulingPass


class MaxUtilization(Capacity):
    """Admits while the request's known tokens fit beside what the admitted still need for theirs."""

    def make_room(self, step: SchedulingPass, num_blocks: int) -> bool:
        while step.kv.free_blocks < num_blocks:
            victim = self._youngest(step)
            if victim is None:
                return False
            step.pause(victim)
        return True

    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        if step.plan.paused_ids or step.seats_left <= 0:
            return Verdict.STOP  # a pass that paused admits nobody: the newcomer would take what was just given back
        match = step.prefix(request)
        needed = min(step.kv.blocks_to_start(match, request.num_tokens), step.peak_blocks(request))
        if needed + step.promised_blocks > step.kv.free_blocks:
            return Verdict.STOP
        if step.lacking_resource(request) is not None:
            return Verdict.SKIP
        return Verdict.ADMIT

    @staticmethod
    def _youngest(step: SchedulingPass) -> RequestView | None:
        """The resident that arrived last, not in flight and not in this plan already."""
        chosen = set(step.plan.decode_ids) | set(step.plan.chunk_ids)
        candidates = (
            request
            for request in step.table.residents()
            if not step.table.is_in_flight(request)
            and not step.is_paused(request.request_id)
            and request.request_id not in chosen
        )
        return max(candidates, key=step.ordering.pause_key, default=None)
