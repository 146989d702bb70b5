"""What each policy is for, shown on the shipped workloads, on the defaults of ``llm-engine simulate``: Llama-2-13B on
four RTX 4070 with 1 Gbit/s between them. docs/schedulers.md has the whole tables.

Every comparison is of the same requests under two policies, or of one policy with and without some of the requests.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from llm_engine.core.config import EngineConfig, SchedulerConfig
from llm_engine.simulation.comparison import Compared, compare
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.entries import parse_entries
from llm_engine.simulation.report import figures, spread
from llm_engine.simulation.run import SimulationRun
from llm_engine.simulation.setup import set_up
from llm_engine.simulation.workload import Arrival, lognormal, prompt
from llm_engine.simulation.workloads import GREEDY_TENANT, WORKLOADS

LONGEST = 4096


@functools.cache
def ran(entry: str, workload: str, seed: int = 0) -> Compared:
    """What ``simulate --workload W --compare ENTRY`` runs."""
    entries = parse_entries(entry, SchedulerConfig())
    (found,) = compare(SimulationConfig(workload=workload), EngineConfig.of(seed=seed), entries)
    return found


def served(entry: str, arrivals: Sequence[Arrival], **settings: Any) -> SimulationRun:
    (config,) = parse_entries(entry, SchedulerConfig(**settings)).values()
    setup = set_up(None, EngineConfig(scheduler=config), arrivals=arrivals)
    return setup.simulator().run(setup.arrivals)


# -- fair


def waits_of_others(run: SimulationRun) -> list[float]:
    """Seconds to the first token, of the requests of all tenants but the greedy one."""
    return [one.ttft for one in run.requests if one.ttft is not None and one.tenant != GREEDY_TENANT]


def with_its_fair_share_only(arrivals: Sequence[Arrival], run: SimulationRun) -> list[Arrival]:
    """The workload with as many of the greedy tenant's requests, drawn at random, as were served while requests came
    in: what fairness left it."""
    share = sum(
        one.tenant == GREEDY_TENANT and one.finished and one.last_token_at <= run.contended_until
        for one in run.requests
    )
    greedy = [index for index, arrival in enumerate(arrivals) if arrival.tenant == GREEDY_TENANT]
    kept = set(random.Random(1).sample(greedy, share))
    return [a for index, a in enumerate(arrivals) if a.tenant != GREEDY_TENANT or index in kept]


@pytest.mark.slow
def test_fair_a_tenant_that_asks_for_more_than_its_share_hardly_delays_the_others() -> None:
    """Against the load in which the greedy tenant asks for its fair share and no more. Of three seeds together, since a
    p99 of one is a single request or two."""
    flooded, modest = [], []
    for seed in range(3):
        arrivals = WORKLOADS["many-tenants"].make(seed, LONGEST)
        run = ran("fair", "many-tenants", seed).run
        share = with_its_fair_share_only(arrivals, run)
        assert len(share) < 0.75 * len(arrivals), "the greedy tenant asks for much more than its share"
        flooded += waits_of_others(run)
        modest += waits_of_others(served("fair", share))
    fcfs = waits_of_others(ran("fcfs", "many-tenants").run)
    fair, before, without = (spread(waits)["p99"] for waits in (flooded, modest, fcfs))
    said = f"p99 TTFT of the others: at its fair share {before:.3f} s, flooded {fair:.3f} s, with fcfs {without:.3f} s"
    assert fair <= 1.3 * before, said
    assert without > 10 * fair, said


def test_fair_everybody_has_their_share_while_requests_come_in() -> None:
    fair, fcfs = (ran(name, "many-tenants").figures["fairness"] for name in ("fair", "fcfs"))
    assert fair >= 0.99 > 0.97 > fcfs, f"Jain's index over max-min fair shares: fair {fair:.4f}, fcfs {fcfs:.4f}"


def test_fair_tenants_who_all_have_requests_waiting_get_the_same() -> None:
    """Jain's index of tokens until the first tenant has all it asked for; until then all have somebody waiting."""
    asked = ["a"] * 300 + ["b"] * 60 + ["c"] * 60 + ["d"] * 60
    rng = random.Random(5)
    arrivals = [
        Arrival(0.0, prompt(index, rng.randint(20, 300)), rng.randint(20, 150), tenant=tenant)
        for index, tenant in enumerate(asked)
    ]
    fair, fcfs = (figures(served(name, arrivals))["fairness"] for name in ("fair", "fcfs"))
    assert fair >= 0.95 > 0.9 > fcfs, f"Jain's index: fair {fair:.4f}, fcfs {fcfs:.4f}"


# -- deadline, priority, longest-prefix


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_deadline_more_requests_make_theirs_under_overload(seed: int) -> None:
    """Goodput: requests a second whose last token came by their deadline. Faster than they can be served, so that with
    fcfs everybody waits."""
    (fcfs, deadline) = compare(
        SimulationConfig(workload="bursty-chat", time_scale=0.7),
        EngineConfig.of(seed=seed),
        parse_entries("fcfs,deadline", SchedulerConfig()),
    )
    assert fcfs.figures["ttft_s"]["p50"] > 10, "overload"
    ratio = deadline.figures["goodput"] / fcfs.figures["goodput"]
    assert ratio >= 1.3, f"goodput: fcfs {fcfs.figures['goodput']:.2f}, deadline {deadline.figures['goodput']:.2f} /s"


def interactive_beside_batch(seed: int) -> list[Arrival]:
    """One interactive request a second, priority 0, before eighty answers of 200 to 600 tokens that all wait."""
    rng = random.Random(seed)
    times = [(0.0, 1)] * 80
    at = 1.0
    while at < 50.0:
        at += rng.expovariate(1.0)
        times.append((at, 0))
    arrivals = []
    for index, (at, priority) in enumerate(sorted(times)):
        input_len = 50 if priority else min(max(lognormal(200, 0.5, rng), 20), 2500)
        output_len = rng.randint(200, 600) if priority else min(max(lognormal(100, 0.8, rng), 5), 500)
        arrivals.append(Arrival(at, prompt(index, input_len), output_len, priority=priority))
    return arrivals


@pytest.mark.slow
def test_priority_the_top_class_hardly_notices_the_others() -> None:
    """Against the same requests of the top class on an engine that has nothing else to do. With 32 seats: what delays
    an urgent request is the micro-batches before it and the decodes beside it, and seats bound both."""
    alone, mixed, fcfs = [], [], []
    for seed in range(3):
        arrivals = interactive_beside_batch(seed)
        top = [arrival for arrival in arrivals if arrival.priority == 0]
        alone += served("priority", top, max_num_seqs=32).ttfts
        for name, found in (("priority", mixed), ("fcfs", fcfs)):
            run = served(name, arrivals, max_num_seqs=32)
            found += [one.ttft for one in run.requests if one.priority == 0 and one.ttft is not None]
    idle, beside, queued = (spread(waits)["p50"] for waits in (alone, mixed, fcfs))
    said = f"p50 TTFT of the top class: alone {idle:.3f} s, beside the others {beside:.3f} s, with fcfs {queued:.3f} s"
    assert beside <= 1.2 * idle, said
    assert queued > 10 * idle, said


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_priority_in_a_burst_the_top_class_goes_first(seed: int) -> None:
    """With as many seats as memory has room for; up to twice as long as alone is what bursts of its own leave."""
    arrivals = WORKLOADS["bursty-chat"].make(seed, LONGEST)
    top = [arrival for arrival in arrivals if arrival.priority == 0]
    alone = spread(served("priority", top).ttfts)["p50"]
    priority, fcfs = (
        ran(name, "bursty-chat", seed).figures["priorities"]["0"]["ttft_s"]["p50"] for name in ("priority", "fcfs")
    )
    said = f"p50 TTFT of the top class: alone {alone:.3f} s, beside the others {priority:.3f} s, with fcfs {fcfs:.3f} s"
    assert priority <= 1.9 * alone < 10 * alone < fcfs, said


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_longest_prefix_finds_more_in_a_cache_that_is_too_small(seed: int) -> None:
    """Share of the prompt tokens that were found in the cache."""
    fcfs, longest = (ran(name, "shared-prefix", seed).figures for name in ("fcfs", "longest-prefix"))
    said = f"hit rate: fcfs {fcfs['prefix_hit_rate']:.3f}, longest-prefix {longest['prefix_hit_rate']:.3f}"
    assert longest["prefix_hit_rate"] >= 1.5 * fcfs["prefix_hit_rate"], said
    assert longest["output_throughput"] > 1.3 * fcfs["output_throughput"]


# -- capacity


@functools.cache
def by_capacity(name: str, num_kv_blocks: int | None) -> SimulationRun:
    """256 requests of 128 tokens in and 128 out, at once."""
    (found,) = parse_entries(name, SchedulerConfig()).values()
    engine = EngineConfig.of(num_kv_blocks=num_kv_blocks)
    setup = set_up(None, EngineConfig(scheduler=found, cache=engine.cache))
    return setup.simulator().run(setup.arrivals)


def throughput(run: SimulationRun) -> float:
    return run.num_output_tokens / run.makespan


def test_with_room_for_everybody_capacities_make_no_difference() -> None:
    names = ("max-utilization", "guaranteed-no-evict", "max-requests")
    assert len({by_capacity(name, 2000).makespan for name in names}) == 1


def test_max_utilization_serves_more_from_memory_that_does_not_suffice_for_all() -> None:
    """What it costs is in the next test."""
    utilized, guaranteed = (by_capacity(name, None) for name in ("max-utilization", "guaranteed-no-evict"))
    said = f"output tokens a second: {throughput(utilized):.0f} against {throughput(guaranteed):.0f}"
    assert throughput(utilized) >= 1.1 * throughput(guaranteed), said


@pytest.mark.parametrize("num_kv_blocks", [None, 160])
def test_max_utilization_pauses_and_computes_again_and_guaranteed_no_evict_never_does(
    num_kv_blocks: int | None,
) -> None:
    """Whoever is paused stands still for a while: the longest time between two tokens of an answer shows it."""
    utilized, guaranteed = (by_capacity(name, num_kv_blocks) for name in ("max-utilization", "guaranteed-no-evict"))
    paused = utilized.num_preemptions
    again = figures(utilized)["recomputed_tokens"]
    said = f"{paused} pauses, {again} tokens computed again, longest gap {max(utilized.itls):.1f} s"
    assert paused > 20 and again > 2000, said
    assert guaranteed.num_preemptions == 0
    assert figures(guaranteed)["recomputed_tokens"] == 0
    assert max(utilized.itls) > 3 * max(guaranteed.itls), f"{said}; guaranteed-no-evict {max(guaranteed.itls):.1f} s"
