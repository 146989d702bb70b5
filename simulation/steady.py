"""How busy stages were between fill and drain, kept while the run goes on: all spans of a long one would not fit.

The words are those of ``metrics.pipeline_report``: a *load* begins with a step that ends an idle time; it is full from
when every stage has begun its first step until the first stage has ended its last one.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from .pipeline import Passage, Times


class SteadyTimes:
    """Told every plan's passage, in the order of the pushes."""

    def __init__(self, num_stages: int, most_in_flight: int) -> None:
        self.loads: list[tuple[float, float]] = []
        """When each load was full; the last one only once ``close`` was called."""
        self._num_stages = num_stages
        self._seconds = np.zeros(num_stages)
        self._busy = np.zeros(num_stages)
        self._outside = np.zeros(num_stages)
        # A step of the drain is in flight when the last one, which counts as well, is pushed.
        self._tail: deque[Passage] = deque(maxlen=most_in_flight)
        self._filled_at = 0.0

    def add(self, passage: Passage, *, after_idle: bool) -> None:
        """One more plan was pushed."""
        if after_idle or not self._tail:
            self.close()
            self._filled_at = max(passage.begins)
        if passage.begins[0] < self._filled_at:
            self._outside += _seconds_in(passage, -math.inf, self._filled_at)
        self._busy += np.subtract(passage.ends, passage.begins)
        self._tail.append(passage)

    def close(self) -> None:
        """The load is over."""
        if self._tail:
            drained_at = max(self._tail[-1].ends[0], self._filled_at)
            for passage in self._tail:
                self._outside += _seconds_in(passage, drained_at, math.inf)
            self.loads.append((self._filled_at, drained_at))
            if drained_at > self._filled_at:
                self._seconds += self._busy - self._outside
        self._tail.clear()
        self._busy, self._outside = np.zeros(self._num_stages), np.zeros(self._num_stages)

    @property
    def full_seconds(self) -> float:
        """Of all loads that were closed."""
        return sum(end - begin for begin, end in self.loads)

    @property
    def stage_busy(self) -> list[float]:
        """Per stage: the share of those seconds that it computed; zeros where there were none."""
        ratios: list[float] = (self._seconds / (self.full_seconds or 1.0)).tolist()
        return ratios


def _seconds_in(passage: Passage, begin: float, end: float) -> Times:
    """Per stage: for how long it worked on this plan between two times."""
    spans: Times = np.clip(passage.ends, begin, end) - np.clip(passage.begins, begin, end)
    return spans
