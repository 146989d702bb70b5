"""How long one step may take before the stage that computes it counts as stuck."""

from __future__ import annotations

from ...core.trace import StepStats

LEAST_SECONDS = 30.0
UNKNOWN_SECONDS = 600.0
"""While no step has come back: the first one of a large model on a small machine may take minutes."""
FACTOR = 10.0


class Patience:
    """Ten times what the largest step that is allowed would take, at least half a minute. Output thread.

    The prediction is made from above, since the price of giving up a stage that only works hard is high: the longest
    forward so far, times the tokens of the largest step over the most that were seen in one.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._most_tokens = 0
        self._longest = 0.0

    @property
    def seconds(self) -> float:
        if not self._most_tokens:
            return UNKNOWN_SECONDS
        predicted = self._longest * max(1.0, self._max_tokens / self._most_tokens)
        return max(LEAST_SECONDS, FACTOR * predicted)

    def observe(self, stats: StepStats) -> bool:
        """Take in a step that came back; whether that changes ``seconds``."""
        longest = max((ended - began for began, ended in stats.busy), default=0.0)
        if stats.failed or (longest <= self._longest and stats.num_tokens <= self._most_tokens):
            return False
        before = self.seconds
        self._longest = max(self._longest, longest)
        self._most_tokens = max(self._most_tokens, stats.num_tokens)
        return self.seconds != before
