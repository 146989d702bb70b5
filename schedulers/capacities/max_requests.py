"""Count requests, not blocks: for a cache that holds everybody.

The rule of TensorRT-LLM's MAX_REQUESTS: whoever finds a seat is admitted. There it is for models without a KV cache;
here there always is one, so two things are added for a cache that turns out too small. The first chunk must find its
blocks, since a plan without them could not run. And a resident that finds none later is helped as under
max-utilization, by pausing whom the ordering pauses first: if nobody gave way, all could wait for each other for ever.
Nobody is paused to admit another.
"""

from __future__ import annotations

from ...core.views import RequestView
from ..base import Capacity, Verdict
from ..scheduling_pass import SchedulingPass
from .pausing import pause_until_free


class MaxRequests(Capacity):
    """As many as there are seats."""

    def make_room(self, step: SchedulingPass, num_blocks: int) -> bool:
        return pause_until_free(step, num_blocks)

    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        if step.seats_left <= 0 or step.plan.paused_ids:
            return Verdict.STOP
        match = step.prefix(request)
        first = step.chunk_size(match.num_tokens, request.num_tokens - match.num_tokens)
        if step.kv.blocks_to_start(match, match.num_tokens + first, claim=False) > step.kv.free_blocks:
            return Verdict.STOP
        if step.peak_blocks(request) > step.kv.num_usable_blocks:
            return Verdict.STOP  # it would begin over and over
        return Verdict.ADMIT if step.lacking_resource(request) is None else Verdict.SKIP
