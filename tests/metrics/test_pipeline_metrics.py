"""The live numbers: the same as a report's over the same steps, never falling, and cheap."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from llm_engine.core.trace import StepStats
from llm_engine.metrics.pipeline_metrics import PipelineMetrics
from llm_engine.metrics.pipeline_report import report
from llm_engine.metrics.step_parts import PARTS, parts_of
from tests.metrics.records import step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fed(records: list[StepStats], num_stages: int = 1, clock: Clock | None = None) -> PipelineMetrics:
    numbers = PipelineMetrics(num_stages, clock or Clock())
    for record in records:
        numbers.add(record)
    return numbers


def random_run(seed: int, num_stages: int = 3) -> list[StepStats]:
    """Loads of random steps over a few queues, with idle times and a restart between them."""
    source = random.Random(seed)
    records: list[StepStats] = []
    free, now, epoch = [0.0] * num_stages, 100.0, 0
    for load in range(4):
        epoch += load == 2
        for number in range(source.randint(1, 12)):
            began, busy = now + source.uniform(0, 3), []
            at = began + 2.0
            for stage in range(num_stages):
                begin = max(at + source.random(), free[stage])
                at = free[stage] = begin + source.uniform(0.5, 9.0)
                busy.append((begin, at))
            record = step(len(records) + 1, *busy, began=began, after_idle=number == 0 and load != 2, epoch=epoch)
            retired = max(record.retired_at, records[-1].retired_at if records else 0.0)
            records.append(replace(record, retired_at=retired))
            now = began + 2.0
        now = records[-1].retired_at + source.uniform(0, 100.0)
    return records


@pytest.mark.parametrize("seed", range(20))
def test_busy_and_bubble_seconds_are_those_of_the_report(seed: int) -> None:
    records = random_run(seed)
    numbers, found = fed(records, 3), report(records)
    assert numbers.busy_seconds == pytest.approx([stage.busy_seconds for stage in found.stages])
    # What the report knows and the counters do not yet: how the last load drained, and the one that a restart ended.
    last_of_epoch = [records[-1], [record for record in records if record.epoch == 0][-1]]
    drains = [sum(max(r.retired_at - r.busy[s][1], 0.0) for r in last_of_epoch) for s in range(3)]
    bubbles = [stage.bubble_seconds - drain for stage, drain in zip(found.stages, drains, strict=True)]
    assert numbers.bubble_seconds == pytest.approx(bubbles)


def test_counters_never_fall() -> None:
    numbers = PipelineMetrics(3, Clock())
    before = [0.0] * 14
    for record in random_run(99):
        numbers.add(record)
        now = [*numbers.busy_seconds, *numbers.bubble_seconds, *numbers.part_seconds]
        assert all(a >= b for a, b in zip(now, before, strict=True))
        before = now


def test_the_parts_are_summed() -> None:
    records = random_run(5)
    numbers = fed(records, 3)
    spans = [(), *(record.busy for record in records)]
    sums = [sum(column) for column in zip(*map(parts_of, records, spans[:-1]), strict=True)]
    assert numbers.num_steps == len(records)
    assert dict(zip(PARTS, numbers.part_seconds, strict=True)) == pytest.approx(dict(zip(PARTS, sums, strict=True)))


def test_the_busy_ratio_looks_ten_seconds_back() -> None:
    clock = Clock()
    numbers = PipelineMetrics(2, clock)
    for second in range(30):
        at = float(second)
        numbers.add(replace(step(second + 1, (at, at + 0.5), (at + 0.25, at + 0.5)), retired_at=at + 0.9))
    clock.now = 30.0
    assert numbers.busy_ratios() == pytest.approx([0.5, 0.25])
    clock.now = 35.0
    assert numbers.busy_ratios() == pytest.approx([0.25, 0.125])
    clock.now = 45.0
    assert numbers.busy_ratios() == [0.0, 0.0]


def test_the_busy_ratio_of_a_young_engine_is_since_its_start() -> None:
    clock = Clock()
    clock.now = 1000.25
    numbers = PipelineMetrics(1, clock)
    numbers.add(replace(step(1, (1000.5, 1001.5)), retired_at=1001.6))
    clock.now = 1002.25
    assert numbers.busy_ratios() == pytest.approx([0.5])
    numbers.add(replace(step(2, (900.0, 1002.0)), retired_at=1002.2))
    assert numbers.busy_ratios() == [1.0], "a step longer than the window is no more than all of it"


def test_the_imbalance_is_of_the_last_revolution() -> None:
    steps = [step(n, (float(n), n + 0.5), tokens=tokens) for n, tokens in enumerate([900, 10, 20, 30])]
    assert fed(steps, num_stages=1).imbalance() == 1.0
    assert fed(steps, num_stages=3).imbalance() == 1.5
    assert fed(steps, num_stages=100).imbalance() == pytest.approx(900 * 4 / 960)
    assert PipelineMetrics(1, Clock()).imbalance() == 0.0


def test_steps_without_stage_times_add_none() -> None:
    numbers = fed([step(1, (0.0, 1.0)), step(2, began=5.0), step(3, (10.0, 11.0))])
    assert numbers.num_steps == 3
    assert numbers.busy_seconds == [2.0]
    assert numbers.bubble_seconds == [3.0 + 9.0]


def test_a_step_of_four_stages_costs_less_than_twenty_microseconds() -> None:
    numbers = PipelineMetrics(4, time.monotonic)
    record = step(1, *((s * 10.0, s * 10.0 + 9.0) for s in range(4)), tokens=64)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(300):
            numbers.add(record)
        best = min(best, (time.perf_counter() - start) / 300)
    assert best < 20e-6
