"""How many tokens a micro-batch has while there are prompts to compute."""

from __future__ import annotations

import math

from ..core.views import TableView
from .limits import Limits
from .outstanding import Outstanding
from .traffic import Traffic

_ENOUGH = 16
"""Times the knee: what a step costs beside its tokens is lost in what they cost, and larger ones only make all decode,
and run out of memory, in one wave."""
_FIXED_SHARE = 0.25
"""Of the knee, what a step of prompts costs beside its tokens: it reads the weights while it computes."""


class BatchSize:
    """Small micro-batches fill and drain the pipeline sooner and go evenly beside those of decodes alone; large ones
    pay less for what every step costs. Which matters more depends on whether prompts come as a burst or as a trickle.
    One stage has no pipeline to fill: with memory for all of a burst and no decode in its steps, the token budget alone
    says how large they are.

    A *burst* of R tokens in micro-batches of T costs ``(R / T + stages - 1)`` steps of ``fixed + T``: least at
    ``T = sqrt(fixed * R / (stages - 1))``. The largest of a burst sets what draining it costs, so T never falls until
    no prompt is left; where others trickle in behind it, the share of what is outstanding keeps micro-batches small.
    Every step of it also carries some of the decodes that it makes, which count as fixed.

    A *trickle* that one revolution has room for, and those who come in as others leave, ride with the decodes. A step
    of decodes reads the weights for few rows and has room for tokens up to the knee that cost it next to nothing. To
    keep their number, each row needs as many prompt tokens as a request has for each of its answer; what room there is
    is filled within an answer's time. More would only come in one wave, pause each other when memory runs out, and
    leave together.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._burst = 0.0
        """Tokens a micro-batch of the burst has for prompts, history counted."""

    def largest(self, table: TableView, work: Outstanding, limits: Limits, num_queues: int, riding: int) -> int:
        """Most tokens a micro-batch should have, decodes included, with the work in ``num_queues`` queues and
        ``riding`` of its decodes beside the prompts. Takes note of the burst it sees.
        """
        if not work.prompt_tokens:
            self._burst = 0.0
            return limits.max_num_batched_tokens
        timing, stages, rows = table.timing, table.num_stages, riding / num_queues
        knee, usual = timing.knee, timing.usual_knee
        size = float(limits.max_num_batched_tokens)
        if stages > 1 or rows or work.crowded:
            size = min(size, rows + _ENOUGH * max(knee, usual))
        if stages > 1:
            fixed = _FIXED_SHARE * knee + work.num_prompts / (2 * stages)
            self._burst = max(self._burst, math.sqrt(fixed * work.prompt_tokens * work.mean_worth / (stages - 1)))
            # Where no decodes ride along, a smaller chunk is not worth a step of its own.
            least = knee - rows if rows else max(knee, usual)
            size = min(size, rows + max(least, self._burst) / work.mean_worth)
        if rows and (work.crowded or work.prompt_tokens <= num_queues * (knee - rows)):
            due = self._traffic.due(rows, work.prompt_tokens / num_queues)
            size = min(size, max(knee, rows + due, rows + limits.chunk_unit))
        return max(1, int(size))
