"""How evenly tenants are served while they compete, against cases worked out by hand."""

from __future__ import annotations

import pytest

from llm_engine.simulation.contention import fair_shares, fairness, jain
from llm_engine.simulation.report import figures
from llm_engine.simulation.run import Served
from llm_engine.simulation.workload import Arrival, prompt
from tests.simulation.pipelines import simulator


@pytest.mark.parametrize(
    ("demands", "total", "shares"),
    [
        ({"a": 10, "b": 10}, 20, {"a": 10, "b": 10}),
        ({"a": 10, "b": 30}, 20, {"a": 10, "b": 10}),
        ({"a": 2, "b": 30}, 20, {"a": 2, "b": 18}),
        ({"a": 2, "b": 5, "c": 100, "d": 100}, 27, {"a": 2, "b": 5, "c": 10, "d": 10}),
        ({"a": 1, "b": 2}, 10, {"a": 1, "b": 2}),
    ],
)
def test_nobody_gets_more_than_demanded_and_the_rest_is_even(
    demands: dict[str | None, float], total: float, shares: dict[str | None, float]
) -> None:
    assert fair_shares(demands, total) == shares


@pytest.mark.parametrize(
    ("values", "index"), [([1, 1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([1, 2], 0.9), ([], 1.0), ([0, 0], 1.0)]
)
def test_jains_index(values: list[float], index: float) -> None:
    assert jain(values) == pytest.approx(index)


def asked(tenant: str | None, num_tokens: int) -> Served:
    return Served(arrival=0.0, num_prompt_tokens=num_tokens - 1, max_output_tokens=1, tenant=tenant)


def test_who_asks_for_little_and_has_it_is_served_fairly() -> None:
    requests = [asked("small", 10), asked("large", 500), asked("larger", 900)]
    assert fairness(requests, {"small": 10, "large": 100, "larger": 100}) == pytest.approx(1.0)


def test_a_tenant_that_takes_the_share_of_another_shows() -> None:
    requests = [asked("quiet", 100), asked("greedy", 900)]
    # Shares of 100 each; the quiet one got a tenth of its own.
    assert fairness(requests, {"quiet": 20, "greedy": 180}) == pytest.approx((0.2 + 1.8) ** 2 / (2 * (0.04 + 3.24)))


def test_one_tenant_alone_has_no_fairness() -> None:
    assert fairness([asked(None, 10), asked(None, 10)], {None: 20}) is None


def test_while_requests_come_in_is_counted_what_everybody_got_by_then() -> None:
    # One token a second, prompts of one block; b's request comes at 4.5, when a has prompt and four tokens.
    arrivals = [Arrival(0.0, prompt(0, 4), 8, tenant="a"), Arrival(4.5, prompt(1, 4), 1, tenant="b")]
    run = simulator((1.0,)).run(arrivals)
    assert run.contended_until == 5.0
    assert run.tenant_tokens == {"a": 4 + 5, "b": 0}


def test_a_prompt_in_progress_counts_as_far_as_it_is_computed() -> None:
    arrivals = [Arrival(0.0, prompt(0, 12), 1, tenant="a"), Arrival(0.5, prompt(1, 4), 1, tenant="b")]
    run = simulator((1.0,), max_num_batched_tokens=4).run(arrivals)
    assert run.contended_until == 1.0
    assert run.tenant_tokens == {"a": 4, "b": 0}


def test_where_all_come_at_once_it_is_counted_until_the_first_tenant_has_everything() -> None:
    arrivals = [Arrival(0.0, prompt(0, 4), 2, tenant="a"), Arrival(0.0, prompt(1, 4), 9, tenant="b")]
    run = simulator((1.0,)).run(arrivals)
    assert run.contended_until == 2.0
    assert run.tenant_tokens == {"a": 6, "b": 6}
    assert figures(run)["fairness"] == 1.0


def test_without_tenants_nothing_is_counted() -> None:
    run = simulator((1.0,)).run([Arrival(0.0, prompt(0, 4), 2), Arrival(1.0, prompt(1, 4), 2)])
    assert run.tenant_tokens == {}
    assert figures(run)["fairness"] is None
    assert figures(run)["tenants"] == {}
