"""The event loop: the engine's books on a virtual clock, against times worked out by hand."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from llm_engine.core.step import StepPlan
from llm_engine.engine.core import EngineCore
from llm_engine.metrics.pipeline_report import report
from llm_engine.simulation.links import Link
from llm_engine.simulation.report import figures, imbalance, micro_batch_tokens
from llm_engine.simulation.run import SimulationRun
from llm_engine.simulation.simulator import HostCost, Simulator
from llm_engine.simulation.workload import Arrival, fixed, prompt
from tests.simulation.pipelines import simulator


def mixed_load(num_requests: int, seed: int, gap: float = 0.0) -> list[Arrival]:
    rng = random.Random(seed)
    at, arrivals = 0.0, []
    for index in range(num_requests):
        at += rng.random() * gap
        arrivals.append(Arrival(at, prompt(index, rng.randint(1, 90)), rng.randint(1, 40)))
    return arrivals


def test_one_request_on_two_stages_by_hand() -> None:
    made = simulator((1.0, 2.0), link=Link(0.5, 1e12), host=HostCost(0.125, 0.25), keep_stats=10)
    run = made.run([Arrival(10.0, prompt(0, 5), 3)])
    # Push 0.125, stages 1 and 2, two hops of 0.5, retire 0.25: 4.375 a token.
    assert run.ttfts == [4.375]
    assert run.itls == [4.375, 4.375]
    assert run.e2es == [3 * 4.375]
    assert run.makespan == 10.0 + 3 * 4.375
    first = run.stats[0]
    assert first.busy == ((10.125, 11.125), (11.625, 13.625))
    assert (first.began_at, first.pushed_at) == (10.0, 10.125)
    assert (first.collected_at, first.update_at, first.retired_at) == (14.125, 14.125, 14.375)
    assert [(s.num_decodes, s.num_chunks, s.num_tokens) for s in run.stats] == [(0, 1, 5), (1, 0, 1), (1, 0, 1)]
    assert [s.after_idle for s in run.stats] == [True, False, False]


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    run = simulator((1.0, 1.0, 1.0), max_num_batched_tokens=4, keep_stats=10).run([Arrival(0.0, prompt(0, 12), 1)])
    assert [s.busy[0] for s in run.stats] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    assert run.makespan == 5.0


def test_the_host_does_one_thing_after_the_other() -> None:
    # Two queues; pushing takes as long as the stage works, so the second result waits until the third push is through.
    made = simulator((1.0, 1.0), host=HostCost(1.0, 0.0), max_num_batched_tokens=4, keep_stats=10, chunk_unit=4)
    run = made.run([Arrival(0.0, prompt(0, 4), 2), Arrival(0.0, prompt(1, 4), 2)])
    assert [s.pushed_at for s in run.stats] == [1.0, 2.0, 4.0, 5.0]
    assert run.makespan == 7.0


def test_without_a_plan_ahead_one_stage_waits_for_the_host_and_with_one_it_does_not() -> None:
    arrivals = fixed(4, 8, 20)
    behind = simulator((1.0,), host=HostCost(0.25, 0.25)).run(arrivals)
    ahead = simulator((1.0,), host=HostCost(0.25, 0.25), schedule_ahead=True).run(arrivals)
    assert behind.makespan == 20 * 1.5
    # The first push, twenty steps and the last update; the plan behind the prompts is made ahead, too.
    assert ahead.makespan == 0.25 + 20 * 1.0 + 0.25
    assert ahead.stage_busy == [1.0]


def test_a_plan_ahead_waits_for_the_ring_of_a_pipeline() -> None:
    # Two queues of one decode each: the first stage could begin at 1 s after the last one, the token comes after 2.
    made = simulator((1.0, 1.0), link=Link(0.5, 1e12), schedule_ahead=True, max_num_batched_tokens=4, keep_stats=50)
    run = made.run([Arrival(0.0, prompt(0, 4), 6), Arrival(0.0, prompt(1, 4), 6)])
    fed = {record.step: record.busy[-1][1] + 0.5 for record in run.stats}
    last: dict[int, int] = {}
    aheads = 0
    for record in sorted(run.stats, key=lambda record: record.step):
        if record.ahead:
            aheads += 1
            assert record.busy[0][0] >= fed[last[record.queue]]
        last[record.queue] = record.step
    assert aheads > 5


def test_arrivals_are_seen_when_they_come() -> None:
    made = simulator((1.0,))
    run = made.run([Arrival(0.0, prompt(0, 4), 1), Arrival(0.5, prompt(1, 4), 1), Arrival(7.0, prompt(2, 4), 1)])
    assert run.ttfts == [1.0, 1.5, 1.0]
    assert [step.load for step in run.steps] == [0, 0, 1]
    assert len(run.loads) == 2


CASES: list[dict[str, Any]] = [
    {},
    {"seconds": (1.0, 2.0, 0.5), "link": Link(0.25, 100.0), "activation_bytes": 1.0},
    {"seconds": (1.0, 1.0), "schedule_ahead": True, "host": HostCost(0.1, 0.1, 0.01, 0.01)},
    {"seconds": (0.5,) * 30, "per_token": 0.01, "schedule_ahead": True},
    {"seconds": (1.0, 1.0), "num_kv_blocks": 60, "max_num_seqs": 30},
    {"seconds": (1.0, 1.0, 1.0), "scheduler": "balanced", "per_token": 0.01, "link": Link(0.1, 1e4)},
    {"seconds": (0.1, 0.1, 3.0), "schedule_ahead": True, "host": HostCost(0.01, 0.01), "link": Link(0.1, 1e6)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gap", [0.0, 3.0, 300.0])
def test_nothing_is_lost_and_nothing_is_left(case: dict[str, Any], gap: float) -> None:
    arrivals = mixed_load(60, seed=1, gap=gap)
    made = simulator(**case, keep_stats=100_000)
    run = made.run(arrivals)
    assert len(run.e2es) == len(run.ttfts) == 60
    assert run.num_output_tokens == sum(arrival.output_len for arrival in arrivals)
    assert len(run.itls) == run.num_output_tokens - 60
    assert run.num_failed == 0
    check_all_given_back(made.core)
    records = list(run.stats)
    assert len(records) == len(run.steps)
    for record in records:
        times = [record.began_at, record.pushed_at, *(t for span in record.busy for t in span)]
        times += [record.collected_at, record.update_at, record.retired_at]
        assert all(before <= after + 1e-9 for before, after in pairwise(times))
    for before, after in pairwise(records):
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(before.busy, after.busy, strict=True))
        assert before.retired_at <= after.update_at


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gap", [0.0, 3.0, 300.0])
def test_the_figures_are_those_of_a_trace(case: dict[str, Any], gap: float) -> None:
    run = simulator(**case, keep_stats=100_000).run(mixed_load(60, seed=2, gap=gap))
    records = list(run.stats)
    traced = report(records)
    ratios = [ratio or 0.0 for ratio in traced.stage_busy]
    assert run.stage_busy == pytest.approx(ratios, abs=1e-9)
    assert run.busy_seconds == pytest.approx([stage.busy_seconds for stage in traced.stages])
    found, tokens = figures(run), traced.micro_batch_tokens
    assert found["full_s"] == pytest.approx(traced.full_seconds, abs=1e-9)
    assert found["stage_busy"] == pytest.approx(list(traced.stage_busy), abs=1e-9)
    assert found["bubble_fraction"] == pytest.approx(traced.bubble_fraction, abs=1e-9)
    if tokens is not None:
        assert micro_batch_tokens(run) == pytest.approx({"min": tokens.min, "mean": tokens.mean, "max": tokens.max})
    if traced.max_over_min is not None:
        assert imbalance(run)["max"] == pytest.approx(traced.max_over_min.max)
        assert imbalance(run)["mean"] == pytest.approx(traced.max_over_min.mean)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_again_gives_the_same(case: dict[str, Any]) -> None:
    def once() -> SimulationRun:
        return simulator(**case, keep_stats=100_000).run(mixed_load(40, seed=3, gap=3.0))

    assert once() == once()


def test_memory_is_enforced_and_short_memory_pauses() -> None:
    usage: list[float] = []

    class Watched(Simulator):
        def _push_one(self) -> bool:
            pushed = super()._push_one()
            usage.append(self.core.kv.usage)
            self.core.check_integrity()
            return pushed

    made = simulator((1.0, 1.0), num_kv_blocks=41, max_num_seqs=30)
    run = Watched(made.core, made.pipeline, made.host).run(fixed(30, 16, 24))
    assert run.num_preemptions > 0
    assert run.kv_usage_peak == max(usage) == 1.0
    assert len(run.e2es) == 30


def test_a_request_that_can_never_run_fails_with_its_reason() -> None:
    run = simulator((1.0,), num_kv_blocks=5).run([Arrival(0.0, prompt(0, 20), 4), Arrival(0.0, prompt(1, 4), 4)])
    assert run.num_failed == 1
    assert run.failure is not None and "can never run" in run.failure
    assert len(run.e2es) == 1


def test_equal_prefixes_are_found_in_the_cache() -> None:
    shared = [Arrival(5.0 * index, prompt(index, 40, 32, 0), 2) for index in range(4)]
    run = simulator((1.0,), keep_stats=100).run(shared)
    assert [record.num_tokens for record in run.stats if record.num_chunks] == [40, 8, 8, 8]


def test_a_simulation_can_begin_with_lopsided_cohorts() -> None:
    made = simulator((1.0,) * 4, num_kv_blocks=6000)
    made.start_with([100, 20, 80, 56], input_len=70, output_len=10)
    assert [len(queue) for queue in made.core.table.queues] == [100, 20, 80, 56]
    run = made.run()
    assert [step.num_decodes for step in run.steps[:4]] == [64, 20, 64, 56]
    assert len(run.e2es) == 256
    assert run.num_output_tokens == 256 * 9
    assert not run.ttfts
    check_all_given_back(made.core)


def test_a_run_may_be_cut_short() -> None:
    assert len(simulator((1.0,)).run(fixed(4, 8, 50), max_steps=7).steps) == 7


@pytest.mark.parametrize("scheduler", ["greedy", "balanced"])
@pytest.mark.parametrize("schedule_ahead", [False, True])
def test_no_empty_plan_is_ever_pushed(scheduler: str, schedule_ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[StepPlan] = []
    schedule = EngineCore.schedule

    def watched(core: EngineCore, now: float) -> StepPlan | None:
        plan = schedule(core, now)
        if plan is not None:
            plans.append(plan)
        return plan

    monkeypatch.setattr(EngineCore, "schedule", watched)
    made = simulator((1.0,) * 4, scheduler=scheduler, schedule_ahead=schedule_ahead)
    run = made.run(mixed_load(50, seed=4, gap=20.0))
    assert len(plans) == len(run.steps) > 500
    assert all(plan.num_rows for plan in plans)


def check_all_given_back(core: EngineCore) -> None:
    core.check_integrity()
    assert core.is_idle
    assert core.kv.usage == 0.0
    assert core.slots.available() == core.limits.max_num_seqs
    assert not core.scheduler.has_work
