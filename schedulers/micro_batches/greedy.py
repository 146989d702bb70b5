"""Decodes first, then prompts, as many tokens as the budget allows: one micro-batch takes all it can."""

from __future__ import annotations

from ..base import Capacity, MicroBatch, Ordering
from ..chunking import ChunkingOptions, take_prompts
from ..filling import Turns, runnable_decodes, take_decodes
from ..scheduling_pass import SchedulingPass


class GreedyMicroBatch(MicroBatch):
    """The unified step of vLLM's V1 scheduler: every request computes its next n tokens, in this order: the queue's
    decodes, the prompts in progress by admission, the waiting by the ordering. Generation loses no budget to prefill.
    """

    Options = ChunkingOptions

    def __init__(self, options: ChunkingOptions | None = None) -> None:
        self._chunking = (options or ChunkingOptions()).chunking
        self._turns = Turns()

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        take_decodes(step, self._turns.take(step, runnable_decodes(step)), capacity)
        take_prompts(step, waiting, capacity, self._chunking)
