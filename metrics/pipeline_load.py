"""Loads: stretches of step records between idle times, and what is measured within one (``pipeline_report``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from ..core.trace import StepStats


def split_loads(records: Iterable[StepStats]) -> Iterator[list[StepStats]]:
    """Cut the records where the engine had been idle or its stages were new."""
    load: list[StepStats] = []
    for record in records:
        if load and (record.after_idle or record.epoch != load[-1].epoch):
            yield load
            load = []
        load.append(record)
    if load:
        yield load


class Load:
    """The steps of one load, seen from ``low`` to ``high``."""

    def __init__(self, steps: Sequence[StepStats], low: float, high: float) -> None:
        self._low, self._high = low, high
        self._all = steps
        self.begin, self.end = max(steps[0].began_at, low), min(steps[-1].retired_at, high)
        self.seconds = max(self.end - self.begin, 0.0)
        self._num_stages = max(len(record.busy) for record in steps)
        self.timed = [record for record in steps if record.busy and len(record.busy) == self._num_stages]
        """Those whose every stage told its times."""
        full = drain = self.begin
        if self.timed:
            full, drain = max(began for began, _ in self.timed[0].busy), self.timed[-1].busy[0][1]
        self.full_begin, self.full_end = max(full, low), min(drain, high)
        self.full_seconds = max(self.full_end - self.full_begin, 0.0)

    def _seen(self, record: StepStats) -> bool:
        return self._low <= record.booked_at < self._high

    def full_steps(self) -> list[StepStats]:
        """Those that the first stage began between fill and drain."""
        if not self.full_seconds:
            return []
        return [record for record in self.timed if self.full_begin <= record.busy[0][0] < self.full_end]

    def pairs(self) -> Iterator[tuple[StepStats, StepStats]]:
        """Each timed step with the one before it."""
        return (pair for pair in itertools.pairwise(self.timed) if self._seen(pair[1]))

    def busy(self, stage: int, begin: float, end: float) -> float:
        """Seconds the stage was busy in a stretch of time."""
        spans = (record.busy[stage] for record in self._all if stage < len(record.busy))
        return sum(max(min(ended, end) - max(began, begin), 0.0) for began, ended in spans)

    def gaps(self, stage: int) -> Iterator[tuple[float, float]]:
        """(gap, time from beginning to beginning) of each step but the first."""
        for before, after in self.pairs():
            (began, ended), (next_began, _) = before.busy[stage], after.busy[stage]
            yield max(next_began - ended, 0.0), next_began - began

    def revolutions(self) -> Iterator[list[int]]:
        """Tokens of each so many consecutive micro-batches as there are stages, after the first so many of the load and
        before its drain."""
        size = self._num_stages
        first = self.timed[0].step + size if self.timed else 0
        tokens = [record.num_tokens for record in self.full_steps() if record.step >= first]
        return (tokens[at : at + size] for at in range(len(tokens) - size + 1)) if size > 1 else iter(())

    def flight_seconds(self) -> float:
        """Micro-batches in flight, summed over the time between fill and drain."""
        begin, end = self.full_begin, self.full_end
        spans = ((record.booked_at, record.retired_at) for record in self._all)
        return sum(max(min(retired, end) - max(booked, begin), 0.0) for booked, retired in spans)

    def most_in_flight(self) -> int:
        """Most micro-batches in flight at a time, between fill and drain."""
        begin, end = self.full_begin, self.full_end
        flights = [r for r in self._all if r.booked_at < end and r.retired_at > begin]
        # At the same moment a retirement counts first.
        changes = sorted([(r.booked_at, 1) for r in flights] + [(r.retired_at, -1) for r in flights])
        return max(itertools.accumulate(change for _, change in changes), default=0)

    def hops(self, stage: int) -> Iterator[float]:
        """What leads to this stage, where it had been free when it was sent."""
        for before, record in self.pairs():
            sent = record.busy[stage - 1][1] if stage else record.booked_at
            if before.busy[stage][1] <= sent:
                yield max(record.busy[stage][0] - sent, 0.0)

    def host_overheads(self) -> Iterator[float]:
        """Of each step that needed what its queue's last one sampled (``pipeline_report``)."""
        last: dict[int, StepStats] = {}
        before: StepStats | None = None
        for record in self.timed:
            came = last.get(record.queue)
            began = record.busy[0][0]
            if came and before and self._seen(record) and _needed(record, came):
                done = came.busy[-1][1]
                waited = max(before.busy[0][1] - min(max(record.pushed_at, done), began), 0.0)
                yield max(began - done - waited, 0.0)
            last[record.queue] = before = record


def _needed(record: StepStats, last: StepStats) -> bool:
    """Whether the step goes on from its queue's last one: decodes, none of them moved here since, and either pushed
    ahead of their tokens or decided when those were known."""
    if last.failed or not 0 < record.num_decodes <= last.num_sampled:
        return False
    return record.ahead or record.booked_at >= last.busy[-1][1]
