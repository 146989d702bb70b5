"""The report over hand-made steps whose figures can be worked out on paper."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llm_engine.core.trace import StepStats
from llm_engine.metrics.pipeline_load import split_loads
from llm_engine.metrics.pipeline_report import Spread, report
from llm_engine.metrics.step_parts import PARTS, parts_of
from tests.metrics.records import step


def perfect(count: int, num_stages: int, seconds: float = 10.0, **more: object) -> list[StepStats]:
    """A pipeline without a gap: step n is on stage s from (n + s) * seconds on, seconds long; one queue per stage."""
    return [
        step(
            number + 1,
            *(((number + s) * seconds, (number + s + 1) * seconds) for s in range(num_stages)),
            queue=number % num_stages,
            **more,  # type: ignore[arg-type]
        )
        for number in range(count)
    ]


def test_a_full_pipeline_is_busy_all_the_time_between_fill_and_drain() -> None:
    found = report(perfect(20, 4))
    assert found.stage_busy == (1.0, 1.0, 1.0, 1.0)
    assert found.bubble_fraction == 0.0
    assert found.full_seconds == 200 - 30  # from stage 3's first step to stage 0's last end
    assert found.seconds == 230 + 4 + 3  # with what comes before and after
    assert [stage.busy_seconds for stage in found.stages] == [200.0] * 4
    assert [stage.bubble_seconds for stage in found.stages] == [37.0] * 4
    assert [stage.gap_ratio for stage in found.stages] == [0.0] * 4
    assert found.num_steps == 20 and found.num_loads == 1 and found.num_tokens == 20


def test_one_request_on_two_stages_leaves_each_idle_half_the_time() -> None:
    records = [step(n + 1, (20.0 * n, 20.0 * n + 10), (20.0 * n + 10, 20.0 * n + 20)) for n in range(10)]
    found = report(records)
    # From 10, where stage 1 begins, to 190, where stage 0 ends: 9 steps of each.
    assert found.full_seconds == 180
    assert found.stage_busy == (0.5, 0.5)
    assert found.bubble_fraction == 0.5
    assert found.stages[0].gap == Spread(9, 10.0, 10.0, 10.0, 10.0, 10.0)
    assert found.stages[0].gap_ratio == 0.5
    assert found.between_steps == Spread(9, 20.0, 20.0, 20.0, 20.0, 20.0)


def test_stages_of_unequal_weight_show_who_waits_for_whom() -> None:
    """Stage 1 takes 10, stage 0 takes 5: it is busy half the time."""
    records = [step(n + 1, (10.0 * n, 10.0 * n + 5), (10.0 * n + 5, 10.0 * n + 15)) for n in range(11)]
    found = report(records)
    assert found.full_seconds == 100  # from 5 to 105
    assert found.stage_busy == (0.5, 1.0)
    assert found.bubble_fraction == 0.25


def test_idle_time_between_loads_is_nobodys_bubble() -> None:
    first, second = perfect(10, 2), perfect(10, 2)
    moved = [
        replace(
            record, step=record.step + 10, after_idle=record.step == 1,
            busy=tuple((b + 1e6, e + 1e6) for b, e in record.busy),
            **{name: getattr(record, name) + 1e6 for name in ("began_at", "booked_at", "retired_at")},
        )
        for record in second
    ]  # fmt: skip
    once, twice = report(first), report([*first, *moved])
    assert twice.num_loads == 2
    assert twice.seconds == 2 * once.seconds and twice.full_seconds == 2 * once.full_seconds
    assert twice.stage_busy == once.stage_busy == (1.0, 1.0)
    assert twice.stages[0].bubble_seconds == 2 * once.stages[0].bubble_seconds
    assert twice.between_steps == Spread(18, 10.0, 10.0, 10.0, 10.0, 10.0), "no step follows over an idle time"


def test_stages_that_were_started_anew_begin_a_load() -> None:
    records = [replace(record, epoch=int(record.step > 3)) for record in perfect(6, 1)]
    assert [[record.step for record in load] for load in split_loads(records)] == [[1, 2, 3], [4, 5, 6]]
    assert list(split_loads([])) == []


def test_a_stretch_can_be_cut_out() -> None:
    """Stage 0 is busy the first half of each 20."""
    records = [step(n + 1, (20.0 * n, 20.0 * n + 10), began=20.0 * n - 3) for n in range(10)]
    found = report(records, begin=40.0, end=80.0)
    assert found.seconds == found.full_seconds == 40
    assert found.stage_busy == (0.5,)
    assert found.num_steps == 2  # booked at 59 and 79
    assert found.stages[0].gap == Spread(2, 10.0, 10.0, 10.0, 10.0, 10.0)
    assert report(records, begin=45.0, end=50.0).stage_busy == (1.0,)
    assert report(records, begin=50.0, end=60.0).stage_busy == (0.0,)
    nothing = report(records, begin=1000.0)
    assert (nothing.num_steps, nothing.seconds, nothing.stage_busy) == (0, 0.0, (None,))


# -- micro-batches


def test_tokens_and_imbalance_are_counted_between_fill_and_drain() -> None:
    sizes = [1, 1, 100, 10, 20, 10, 20, 10, 20]
    records = [replace(r, num_tokens=n, num_decodes=n) for r, n in zip(perfect(9, 3), sizes, strict=True)]
    found = report(records)
    # The first two fill; step 3 is on stage 0 when stage 2 begins step 1.
    assert found.micro_batch_tokens == Spread(7, 10.0, 190 / 7, 20.0, 100.0, 100.0)
    # Revolutions after the first three steps: 10 20 10, 20 10 20, 10 20 10, 20 10 20.
    assert found.max_over_min == Spread(4, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert found.max_over_mean is not None
    assert (found.max_over_mean.max, found.max_over_mean.min) == pytest.approx((1.5, 1.2))


def test_one_stage_knows_no_imbalance() -> None:
    assert report(perfect(5, 1)).max_over_min is None


def test_a_revolution_has_a_micro_batch_for_each_stage_however_many_queues_there_are() -> None:
    sizes = [1, 1, 10, 20] * 5
    records = [replace(r, num_tokens=n, num_decodes=n) for r, n in zip(perfect(20, 2), sizes, strict=True)]
    found = report([replace(record, queue=record.step % 4) for record in records])
    # After the first two steps: 10 20, 20 1, 1 1, 1 10, and again.
    assert found.max_over_min is not None and found.max_over_min.count == 17
    assert (found.max_over_min.min, found.max_over_min.p50, found.max_over_min.max) == (1.0, 2.0, 20.0)


def test_micro_batches_in_flight_are_averaged_over_time() -> None:
    """Two overlap by half, for ever: booked at 20 n, retired at 20 n + 30."""
    records = [step(n + 1, (20.0 * n + 1, 20.0 * n + 19), began=20.0 * n - 2) for n in range(100)]
    records = [replace(record, retired_at=record.booked_at + 30) for record in records]
    found = report(records, begin=400.0, end=1400.0)
    assert found.in_flight_mean == pytest.approx(1.5)
    assert found.in_flight_max == 2


# -- a step's time


def test_the_parts_of_a_step_add_up_to_all_of_it() -> None:
    before = step(1, (0.0, 10.0), (10.0, 25.0))
    after = step(2, (10.5, 20.0), (26.0, 30.0), began=4.0)
    parts = dict(zip(PARTS, parts_of(after, before.busy), strict=True))
    assert parts == {
        "schedule": 2.0, "push": 1.0,
        "wait": 4.0 + 5.0,  # booked at 6 and free at 10; sent at 20 and free at 25
        "hop": 0.5 + 1.0,
        "stage": 9.5 + 4.0, "collect": 1.0, "lock": 1.0, "update": 2.0,
    }  # fmt: skip
    assert sum(parts.values()) - parts["push"] == after.retired_at - after.began_at


def test_a_stage_that_was_free_is_waited_for_by_nobody() -> None:
    after = step(2, (30.0, 35.0), began=20.0)
    parts = dict(zip(PARTS, parts_of(after, ((0.0, 10.0),)), strict=True))
    assert (parts["wait"], parts["hop"]) == (0.0, 8.0)
    assert parts_of(after, ())[PARTS.index("wait")] == 0.0


def test_clocks_that_disagree_count_as_no_time_rather_than_less() -> None:
    after = step(2, (1.0, 5.0), (4.0, 9.0), began=0.0)
    parts = dict(zip(PARTS, parts_of(after, ((0.0, 0.5), (0.0, 0.5))), strict=True))
    assert parts["hop"] == parts["wait"] == 0.0


def test_hops_are_measured_where_nothing_was_in_the_way() -> None:
    records = [
        step(1, (0.0, 10.0), (12.0, 20.0)),
        step(2, (10.0, 18.0), (20.0, 30.0), began=5.0),  # stage 0 until 10, stage 1 until 20 are in the way
        step(3, (50.0, 60.0), (63.0, 70.0), began=45.0),  # booked at 47
    ]
    found = report(records)
    assert found.hops == (Spread(1, 3.0, 3.0, 3.0, 3.0, 3.0), Spread(1, 3.0, 3.0, 3.0, 3.0, 3.0))


def test_host_overhead_is_from_the_last_stage_to_the_first_of_the_same_queue() -> None:
    """One queue: done at 20, 45, fed again at 25, 50."""
    records = [
        step(1, (0.0, 10.0), (10.0, 20.0)),
        step(2, (25.0, 35.0), (35.0, 45.0)),
        step(3, (50.0, 55.0), (55.0, 60.0)),
    ]
    assert report(records).host_overhead == Spread(2, 5.0, 5.0, 5.0, 5.0, 5.0)


def test_the_wait_for_a_busy_first_stage_is_no_host_overhead() -> None:
    """Queue 0 is done at 20; its next plan is pushed at 24, while queue 1 has the first stage until 40."""
    first, other = step(1, (0.0, 10.0), (10.0, 20.0)), step(2, (10.0, 40.0), (40.0, 50.0), queue=1)
    again = step(3, (41.0, 51.0), (51.0, 60.0), began=21.0)
    assert again.pushed_at == 24.0
    found = report([first, other, again])
    assert found.host_overhead == Spread(1, 5.0, 5.0, 5.0, 5.0, 5.0)  # 4 until the push, and 1 once the stage was free


def test_a_step_pushed_ahead_has_only_the_tokens_way_left_in_its_host_overhead() -> None:
    first = step(1, (0.0, 10.0))
    ahead = step(2, (11.0, 20.0), began=1.0, ahead=True)
    assert report([first, ahead]).host_overhead == Spread(1, 1.0, 1.0, 1.0, 1.0, 1.0)
    other, late = step(2, (10.0, 40.0), queue=1), step(3, (42.0, 50.0), began=1.0, ahead=True)
    found = report([first, other, late]).host_overhead
    assert found == Spread(1, 2.0, 2.0, 2.0, 2.0, 2.0), "the first stage was busy until 40"


def test_rows_that_came_from_other_queues_did_not_wait_for_this_one() -> None:
    first = step(1, (0.0, 10.0), tokens=4)
    assert report([first, step(2, (15.0, 20.0), tokens=5)]).host_overhead is None


def test_host_overhead_is_of_steps_that_had_to_wait_for_the_one_before() -> None:
    first = step(1, (0.0, 10.0))
    assert report([first, step(2, (15.0, 20.0), tokens=8, chunk=8)]).host_overhead is None
    assert report([first, step(2, (15.0, 20.0), queue=1)]).host_overhead is None
    assert report([first, step(2, (15.0, 20.0), began=7.5)]).host_overhead is None, "booked before the end at 10"
    assert report([replace(first, failed=True), step(2, (15.0, 20.0))]).host_overhead is None
    assert report([first, step(2, (15.0, 20.0), after_idle=True)]).host_overhead is None
    assert report([first, step(2, (15.0, 20.0), tokens=8, chunk=7)]).host_overhead is not None


# -- the edges


def test_percentiles_are_values_that_were_measured() -> None:
    assert Spread.of(range(1, 101)) == Spread(100, 1, 50.5, 50, 99, 100)
    assert Spread.of([3.0]) == Spread(1, 3.0, 3.0, 3.0, 3.0, 3.0)
    assert Spread.of([]) is None


def test_nothing_gives_nothing() -> None:
    found = report([])
    assert (found.num_steps, found.num_loads, found.stages, found.bubble_fraction) == (0, 0, (), None)
    assert found.parts == {}


def test_steps_without_stage_times_count_in_the_parts_alone() -> None:
    found = report([step(1, began=0.0), step(2, (10.0, 20.0)), step(3, (20.0, 30.0))])
    assert found.num_steps == 3
    assert found.parts["schedule"].count == 3
    assert found.stage_busy == (1.0,)
    assert found.stages[0].busy_seconds == 20.0


def test_a_load_too_short_to_fill_the_pipeline_has_no_busy_ratio() -> None:
    found = report([step(1, (0.0, 10.0), (10.0, 20.0))])
    assert found.stage_busy == (None, None)
    assert found.bubble_fraction is None and found.in_flight_mean is None
    assert found.stages[1].busy_seconds == 10.0


def test_failed_steps_and_steps_ahead_are_counted() -> None:
    found = report([step(1, (0.0, 1.0), failed=True), step(2, (1.0, 2.0), ahead=True), step(3, (2.0, 3.0), ahead=True)])
    assert (found.num_failed, found.num_ahead) == (1, 2)


def test_the_report_as_json_is_plain_numbers() -> None:
    plain = json.loads(json.dumps(report(perfect(20, 2)).as_json()))
    assert plain["stage_busy"] == [1.0, 1.0]
    assert plain["micro_batch_tokens"]["mean"] == 1.0
    assert plain["parts"]["stage"]["p50"] == 20.0
