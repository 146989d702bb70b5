"""How many running queues are worth while: more keep the stages busy, fewer keep the micro-batches large."""

from __future__ import annotations

from ..core.views import TableView
from .outstanding import Outstanding

_AS_GOOD = 0.01
"""Up to this share more time, two counts are level."""
_UNSURE_OF_SIZES = 0.02
"""How far off estimates are: where each size was measured,"""
_UNSURE_OF_LINE = 0.03
"""where a line goes through all sizes,"""
_UNSURE_OF_GUESS = 0.1
"""and where the size was never measured. Tuned over the grid of ``benchmarks.pipeline_grid``, as the others."""


class QueueCount:
    """Chosen by what steps cost here: with k micro-batches of n tokens a revolution takes
    ``max(k * slowest(n), around(n))``, since either the slowest stage never rests or a micro-batch waits for itself.

    So there are as many as stages, more where links and the host take time on the way round, fewer where one stage is
    much slower than the others. Looked at again once a revolution, and when the work has doubled or halved.

    A few decodes make micro-batches of one token or two, over and over, and there what just these sizes took counts;
    all others come as it happens, and the line through all of them says best how they compare. Without prompts it goes
    through steps of decodes alone: each row reads a history of its own, and costs more than a prompt's token.
    """

    def __init__(self) -> None:
        self.count = 0
        self._look_again_at = 0
        self._tokens = 0

    def choose(self, table: TableView, work: Outstanding, largest: int) -> int:
        """With micro-batches of up to ``largest`` tokens. Without measurements, as many as stages."""
        timing, stages = table.timing, table.num_stages
        tokens = max(1, work.num_decodes + work.prompt_tokens)
        decodes = not work.prompt_tokens
        few = decodes and tokens <= 2 * stages
        trip = timing.round_trip(min(largest, tokens / (self.count or stages)), bent=few, decodes=decodes)
        if trip is None:
            self.count = min(len(table.queues), stages)
        elif timing.num_steps >= self._look_again_at or not self._tokens < 2 * tokens < 4 * self._tokens:
            times = []
            for count in range(1, min(len(table.queues), tokens) + 1):
                size = min(largest, -(-tokens // count))
                less = max(0, count * size - tokens) if few else 0  # these have a token less
                slowest = (count - less) * trip.slowest.at(size) + less * trip.slowest.at(size - 1)
                revolution = max(slowest, trip.around.at(size))
                times.append(revolution / min(count * size, tokens))
            unsure = _UNSURE_OF_SIZES if few else _UNSURE_OF_LINE
            if decodes and not timing.was_seen(-(-tokens // (self.count or stages))):
                unsure = _UNSURE_OF_GUESS  # what the present count takes is not known yet
            self.count = self._best(times, min(stages, len(times)), unsure)
            self._look_again_at, self._tokens = timing.num_steps + self.count, tokens
        return self.count

    def _best(self, times: list[float], stages: int, unsure: float) -> int:
        """The count with the least seconds a token; but as many as ``stages`` where those are as good, and not another
        one than now for a gain that may be none."""
        for count, indifferent in ((stages, _AS_GOOD), (self.count, unsure)):
            if 0 < count <= len(times) and times[count - 1] <= min(times) * (1.0 + indifferent):
                return count
        return times.index(min(times)) + 1
