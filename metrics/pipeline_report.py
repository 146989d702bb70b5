"""What a pipeline did, from its step records: how busy its stages were, where time went, how even the micro-batches.

Pure functions over ``StepStats``; the same for a real run and a simulated one. The words:

- A *load* begins with a step that ended an idle time (``StepStats.after_idle``), or came after the stages were started
  anew, and ends before the next such step. Between loads nobody waits, so stages have nothing to do.
- *Between fill and drain*: in each load from when every stage has begun its first step until the first stage has ended
  its last one. Busy ratios and the bubble fraction are of this time, summed over the loads.
- *Bubble seconds* of a stage: all the time of the loads, fill and drain included, less what it was busy. The metric
  ``llm_engine_stage_bubble_seconds_total`` counts the same.
- A *revolution* is as many consecutive micro-batches as there are stages, which fill the pipeline; however many queues
  a scheduler has, so that schedulers compare. Its imbalance is the largest over the smallest, or over the mean, in
  tokens; counted after the first revolution of a load and before its drain.
- *Host overhead*: from the last stage's end of a queue's step until the first stage begins that queue's next one, less
  the time that one stood before a busy first stage. Only of steps with decodes that were neither pushed ahead nor
  otherwise before that end: they alone had to wait for it.
- *Gap* of a stage: from the end of one step to the beginning of the next one, within a load.
- *Hop*: from one stage's end to the next one's beginning, where the next one had been free already. The first is from
  the booking of the plan to the first stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.percentiles import nearest_rank
from ..core.trace import StepStats
from .pipeline_load import Load, split_loads
from .step_parts import PARTS, parts_of


@dataclass(frozen=True, slots=True)
class Spread:
    """A sample in a few numbers; percentiles are values that were measured (nearest rank)."""

    count: int
    min: float
    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """``None`` for no values."""
        ranked = sorted(values)
        if not ranked:
            return None
        count = len(ranked)
        p50, p99 = nearest_rank(ranked, 50), nearest_rank(ranked, 99)
        return cls(count, ranked[0], sum(ranked) / count, p50, p99, ranked[-1])


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage. See the module's docstring for the words."""

    busy_ratio: float | None
    """Between fill and drain; ``None`` where there is no such time."""
    busy_seconds: float
    bubble_seconds: float
    gap: Spread | None
    gap_ratio: float | None
    """Gaps over the time from one step's beginning to the next one's."""


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """A stretch of records. Times are seconds; ``None`` is what was not to be measured in it."""

    num_steps: int
    num_failed: int
    num_ahead: int
    num_loads: int
    num_tokens: int
    seconds: float
    """Of the loads, from the first plan's beginning to the last retirement."""
    full_seconds: float
    """Of it between fill and drain."""
    stages: tuple[StageReport, ...]
    bubble_fraction: float | None
    """1 less the mean busy ratio."""
    micro_batch_tokens: Spread | None
    """Between fill and drain."""
    max_over_min: Spread | None
    """Imbalance of each revolution; ``None`` with one stage."""
    max_over_mean: Spread | None
    in_flight_mean: float | None
    """Micro-batches, between fill and drain, over time."""
    in_flight_max: int | None
    parts: dict[str, Spread] = field(default_factory=dict)
    """By the names of ``step_parts.PARTS``."""
    hops: tuple[Spread | None, ...] = ()
    """By the stage they lead to."""
    host_overhead: Spread | None = None
    between_steps: Spread | None = None
    """From one step's end on the last stage to the next one's, within a load."""

    @property
    def stage_busy(self) -> tuple[float | None, ...]:
        """Each stage's busy ratio."""
        return tuple(stage.busy_ratio for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers by name, ``stage_busy`` among them."""
        return asdict(self) | {"stage_busy": list(self.stage_busy)}


def report(
    records: Iterable[StepStats],
    *,
    begin: float | None = None,
    end: float | None = None,
) -> PipelineReport:
    """Sum up the records of one engine, in the order of their retirement, or those of a stretch of it.

    ``begin`` and ``end`` cut a stretch out, on the records' clock: steps count that were booked in it, busy times as
    far as they lie in it. Steps whose stages told no times count in ``parts`` alone.
    """
    records = list(records)
    low = begin if begin is not None else -float("inf")
    high = end if end is not None else float("inf")
    chosen = [record for record in records if low <= record.booked_at < high]
    loads = [Load(steps, low, high) for steps in split_loads(records)]
    loads = [load for load in loads if load.seconds > 0.0]
    num_stages = max((len(record.busy) for record in records), default=0)
    full_seconds = sum(load.full_seconds for load in loads)
    stages = tuple(_stage(loads, index, full_seconds) for index in range(num_stages))
    ratios = [stage.busy_ratio for stage in stages if stage.busy_ratio is not None]
    revolutions = [tokens for load in loads for tokens in load.revolutions()]
    pairs = [pair for load in loads for pair in load.pairs()]
    parts = zip(*_parts(records, low, high), strict=True)
    return PipelineReport(
        num_steps=len(chosen),
        num_failed=sum(record.failed for record in chosen),
        num_ahead=sum(record.ahead for record in chosen),
        num_loads=len(loads),
        num_tokens=sum(record.num_tokens for record in chosen),
        seconds=sum(load.seconds for load in loads),
        full_seconds=full_seconds,
        stages=stages,
        bubble_fraction=1.0 - sum(ratios) / len(ratios) if ratios else None,
        micro_batch_tokens=Spread.of(float(record.num_tokens) for load in loads for record in load.full_steps()),
        max_over_min=Spread.of(max(tokens) / min(tokens) for tokens in revolutions),
        max_over_mean=Spread.of(max(tokens) * len(tokens) / sum(tokens) for tokens in revolutions),
        in_flight_mean=sum(load.flight_seconds() for load in loads) / full_seconds if full_seconds else None,
        in_flight_max=max((load.most_in_flight() for load in loads if load.full_seconds), default=None),
        parts={name: spread for name, values in zip(PARTS, parts, strict=False) if (spread := Spread.of(values))},
        hops=tuple(Spread.of(hop for load in loads for hop in load.hops(index)) for index in range(num_stages)),
        host_overhead=Spread.of(overhead for load in loads for overhead in load.host_overheads()),
        between_steps=Spread.of(after.busy[-1][1] - before.busy[-1][1] for before, after in pairs),
    )


def _stage(loads: list[Load], stage: int, full_seconds: float) -> StageReport:
    busy = sum(load.busy(stage, load.begin, load.end) for load in loads)
    full = sum(load.busy(stage, load.full_begin, load.full_end) for load in loads if load.full_seconds)
    gaps = [gap for load in loads for gap in load.gaps(stage)]
    period = sum(between for _, between in gaps)
    return StageReport(
        busy_ratio=full / full_seconds if full_seconds else None,
        busy_seconds=busy,
        bubble_seconds=max(sum(load.seconds for load in loads) - busy, 0.0),
        gap=Spread.of(gap for gap, _ in gaps),
        gap_ratio=sum(gap for gap, _ in gaps) / period if period else None,
    )


def _parts(records: Sequence[StepStats], low: float, high: float) -> Iterator[tuple[float, ...]]:
    before: tuple[tuple[float, float], ...] = ()
    for record in records:
        if low <= record.booked_at < high:
            yield parts_of(record, before)
        before = record.busy or before
