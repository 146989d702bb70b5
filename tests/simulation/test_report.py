"""What is made of a run: good answers, groups, what was computed once more."""

from __future__ import annotations

import pytest

from llm_engine.metrics.pipeline_report import Spread
from llm_engine.simulation.report import Slo, figures, recomputed_tokens, spread
from llm_engine.simulation.run import Served
from llm_engine.simulation.workload import Arrival, prompt
from tests.simulation.pipelines import simulator


def served(first: float = 2.0, last: float = 5.0, tokens: int = 4, deadline: float | None = None) -> Served:
    made = Served(arrival=1.0, num_prompt_tokens=10, max_output_tokens=tokens, deadline=deadline)
    made.first_token_at, made.last_token_at, made.num_output_tokens, made.finished = first, last, tokens, True
    return made


@pytest.mark.parametrize(
    ("slo", "one", "is_good"),
    [
        (Slo(), served(), True),
        (Slo(ttft=1.0), served(), True),
        (Slo(ttft=0.99), served(), False),
        (Slo(mean_itl=1.0), served(), True),
        (Slo(mean_itl=0.99), served(), False),
        (Slo(mean_itl=0.01), served(last=2.0, tokens=1), True),
        (Slo(), served(deadline=5.0), True),
        (Slo(), served(deadline=4.99), False),
        (Slo(ttft=0.01, mean_itl=0.01), served(deadline=5.0), True),
    ],
)
def test_a_good_answer_keeps_its_deadline_or_else_the_slo(slo: Slo, one: Served, is_good: bool) -> None:
    assert slo.met_by(one) is is_good


def test_an_answer_that_never_came_is_not_good() -> None:
    one = served()
    one.finished = False
    assert not Slo().met_by(one)


def test_percentiles_are_those_of_a_traces_report() -> None:
    values = [float(value * 7 % 101) for value in range(101)]
    mine, other = spread(values), Spread.of(values)
    assert other is not None
    assert (mine["p50"], mine["p99"]) == (other.p50, other.p99)
    assert mine["mean"] == pytest.approx(other.mean)
    assert mine["p90"] in values


def test_goodput_counts_what_kept_its_deadline() -> None:
    # Each takes 1 + 2 = 3 s; the second deadline is missed by the wait for the first step.
    arrivals = [
        Arrival(0.0, prompt(0, 4), 3, deadline=3.0),
        Arrival(0.5, prompt(1, 4), 3, deadline=3.0),
        Arrival(20.0, prompt(2, 4), 3),
    ]
    found = figures(simulator((1.0,)).run(arrivals))
    assert found["good_requests"] == 2
    assert found["good_share"] == pytest.approx(2 / 3)
    assert found["goodput"] == pytest.approx(2 / 23.0)


def test_a_load_too_short_to_fill_the_pipeline_tells_no_busy_ratio() -> None:
    run = simulator((1.0, 1.0)).run([Arrival(0.0, prompt(0, 4), 1)])
    found = figures(run)
    assert (found["full_s"], found["stage_busy"], found["bubble_fraction"]) == (0.0, [None, None], None)
    assert found["stage_busy_overall"] == [0.5, 0.5]


def test_tenants_and_priorities_have_times_of_their_own() -> None:
    arrivals = [
        Arrival(0.0, prompt(0, 4), 2, tenant="a", priority=0),
        Arrival(0.5, prompt(1, 4), 2, tenant="b", priority=3),
        Arrival(9.0, prompt(2, 4), 2, tenant="b", priority=0),
    ]
    found = figures(simulator((1.0,)).run(arrivals))
    assert {name: group["requests"] for name, group in found["tenants"].items()} == {"a": 1, "b": 2}
    assert found["tenants"]["b"]["ttft_s"]["p99"] == 1.5
    assert found["priorities"]["0"]["ttft_s"] == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0}
    assert found["priorities"]["3"]["finished"] == 1


def test_who_has_no_tenant_is_not_one_called_none() -> None:
    arrivals = [Arrival(float(index), prompt(index, 4), 2, tenant=name) for index, name in enumerate((None, "None"))]
    found = figures(simulator((1.0,)).run(arrivals))
    assert {name: group["requests"] for name, group in found["tenants"].items()} == {"None": 1, "anonymous": 1}


def test_without_a_pause_nothing_is_computed_once_more() -> None:
    shared = [Arrival(5.0 * index, prompt(index, 40, 32, 0), 2) for index in range(4)]
    run = simulator((1.0,)).run(shared)
    assert recomputed_tokens(run) == 0
    found = figures(run)
    assert found["prefix_hit_rate"] == pytest.approx(3 * 32 / 160)


def test_a_pause_is_paid_for_by_computing_again() -> None:
    run = simulator((1.0,), num_kv_blocks=9, enable_prefix_caching=False).run(
        [Arrival(0.0, prompt(index, 12), 10) for index in range(2)]
    )
    assert run.num_preemptions == 1
    paused_with = sum(step.num_tokens for step in run.steps) - 2 * (12 + 9)
    assert recomputed_tokens(run) == paused_with > 0


def test_the_mean_use_of_the_cache_is_over_time() -> None:
    # A block of four for prompt and first token's step, then nothing until the second comes.
    run = simulator((1.0,), num_kv_blocks=11, enable_prefix_caching=False).run(
        [Arrival(0.0, prompt(0, 4), 1), Arrival(3.0, prompt(1, 4), 1)]
    )
    assert run.kv_usage_peak == pytest.approx(0.1)
    assert run.kv_usage_mean == pytest.approx(0.1 * 2 / 4)
