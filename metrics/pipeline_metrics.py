"""The pipeline's live numbers, added up step by step: what each stage was busy and idle, and where a step's time went.

The words are those of ``pipeline_report``. A step is counted when it retires, so what a stage computes at the moment is
counted later, and so is the drain of a load: when the next load begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..core.trace import StepStats
from .step_parts import PARTS, Busy, parts_of

WINDOW = 10
"""Seconds that the busy ratio looks back."""


class PipelineMetrics:
    """Not locked: the owner's lock covers it. ``clock`` is that of the records."""

    def __init__(self, num_stages: int, clock: Callable[[], float]) -> None:
        self.num_steps = 0
        self.busy_seconds = [0.0] * num_stages
        self.bubble_seconds = [0.0] * num_stages
        self.part_seconds = [0.0] * len(PARTS)
        self._clock, self._began = clock, clock()
        self._tokens: deque[int] = deque(maxlen=num_stages)
        """Of the last revolution: a micro-batch for each stage."""
        self._before: Busy = ()
        """The busy spans of the last step."""
        self._epoch = -1
        self._retired_at = 0.0
        self._recent: deque[tuple[int, list[float]]] = deque()
        """(second, busy seconds of each stage that were counted in it), for ``WINDOW`` seconds."""

    def add(self, step: StepStats) -> None:
        """Count a step; in the order of retirement."""
        self.num_steps += 1
        self._tokens.append(step.num_tokens)
        totals = self.part_seconds
        for index, seconds in enumerate(parts_of(step, self._before)):
            totals[index] += seconds
        if len(step.busy) == len(self.busy_seconds):
            self._add_busy(step)
            self._before = step.busy
        self._retired_at = step.retired_at

    def busy_ratios(self) -> list[float]:
        """Of each stage, over the last ``WINDOW`` seconds or since the start; an idle engine's are 0."""
        now = self._clock()
        first = max(int(now) - WINDOW, self._began)
        sums = [0.0] * len(self.busy_seconds)
        for second, busy in self._recent:
            if second + 1 > first:
                sums = [a + b for a, b in zip(sums, busy, strict=True)]
        seconds = max(now - first, 1e-3)
        return [min(total / seconds, 1.0) for total in sums]

    def imbalance(self) -> float:
        """Largest over mean tokens of the last revolution; 0 before the first step."""
        last = self._tokens
        return max(last) * len(last) / sum(last) if last else 0.0

    def _add_busy(self, step: StepStats) -> None:
        before = self._before
        begins_load = step.after_idle or step.epoch != self._epoch or not before
        if begins_load and before and step.epoch == self._epoch:
            for stage, (_, ended) in enumerate(before):  # how its last load drained
                self.bubble_seconds[stage] += max(self._retired_at - ended, 0.0)
        recent = self._recent_busy(int(step.retired_at))
        for stage, (began, ended) in enumerate(step.busy):
            gap = began - (step.began_at if begins_load else before[stage][1])
            if gap > 0.0:
                self.bubble_seconds[stage] += gap
            busy = ended - began
            self.busy_seconds[stage] += busy
            recent[stage] += busy
        self._epoch = step.epoch

    def _recent_busy(self, second: int) -> list[float]:
        recent = self._recent
        if not recent or recent[-1][0] != second:
            recent.append((second, [0.0] * len(self.busy_seconds)))
            while recent[0][0] < second - WINDOW:
                recent.popleft()
        return recent[-1][1]
