"""Decodes first, then prompts, as many tokens as the budget allows: one micro-batch takes all it can."""

from __future__ import annotations

from ..base import Capacity, MicroBatch, Ordering, Verdict
from ..filling import Turns, runnable_decodes, start_prompt, take_chunk, take_decodes
from ..scheduling_pass import SchedulingPass


class GreedyMicroBatch(MicroBatch):
    """The unified step of vLLM's V1 scheduler: every request computes its next n tokens, in this order: the queue's
    decodes, the prompts in progress by admission, the waiting by the ordering. Generation loses no budget to prefill.
    """

    def __init__(self) -> None:
        self._turns = Turns()

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        take_decodes(step, self._turns.take(step, runnable_decodes(step)), capacity)
        for request in step.table.unfilled.values():
            if not step.has_room:
                return
            take_chunk(step, request, capacity)
        for request in waiting.visit(step):
            if not step.has_room:
                return
            verdict = capacity.judge(step, request)
            if verdict is Verdict.STOP:
                return
            if verdict is Verdict.ADMIT and not start_prompt(step, request):
                return
