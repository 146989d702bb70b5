"""The workloads that are shipped: the same for a seed, and what they say they are."""

from __future__ import annotations

from collections import Counter

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.workload import describe
from llm_engine.simulation.workloads import GREEDY_TENANT, WORKLOADS


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_seed_decides(name: str) -> None:
    make = WORKLOADS[name].make
    assert make(3, 4096) == make(3, 4096)
    assert make(3, 4096) != make(4, 4096)


@pytest.mark.parametrize("name", WORKLOADS)
def test_they_come_in_order_and_fit_the_context(name: str) -> None:
    arrivals = WORKLOADS[name].make(0, 4096)
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert max(a.num_tokens for a in arrivals) <= 4096
    assert 100 < len(arrivals) < 1000


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_context_that_is_too_short_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a context of 500 tokens"):
        WORKLOADS[name].make(0, 500)


def test_bursty_chat_has_bursts_priorities_and_deadlines() -> None:
    arrivals = WORKLOADS["bursty-chat"].make(0, 4096)
    by_second = Counter(int(a.at) for a in arrivals)
    assert by_second[5] >= 90 > 10 > by_second[8]
    assert {a.priority for a in arrivals} == {0, 1}
    assert all(a.deadline is not None for a in arrivals)


def test_long_documents_are_few_and_have_most_of_the_tokens() -> None:
    arrivals = WORKLOADS["long-documents"].make(0, 4096)
    documents = [a for a in arrivals if len(a.prompt_token_ids) >= 2000]
    assert 0.1 < len(documents) / len(arrivals) < 0.3
    assert sum(a.num_tokens for a in documents) > 0.7 * sum(a.num_tokens for a in arrivals)


def test_one_of_many_tenants_asks_for_several_times_as_much_as_all_others() -> None:
    asked = Counter(a.tenant for a in WORKLOADS["many-tenants"].make(0, 4096))
    assert len(asked) == 9
    assert asked[GREEDY_TENANT] > 2 * (asked.total() - asked[GREEDY_TENANT])


def test_shared_prefixes_exceed_the_cache() -> None:
    arrivals = WORKLOADS["shared-prefix"].make(0, 4096)
    prefixes = {tuple(a.prompt_token_ids[:1536]) for a in arrivals}
    assert len(prefixes) == 32
    assert len(prefixes) * 1536 > 2 * 20_992


def test_a_name_is_a_workload_and_its_times_can_be_scaled() -> None:
    named = describe(SimulationConfig(workload="many-tenants"), 7, 4096)
    assert named == WORKLOADS["many-tenants"].make(7, 4096)
    faster = describe(SimulationConfig(workload="many-tenants", time_scale=0.5), 7, 4096)
    assert [a.at for a in faster] == [a.at * 0.5 for a in named]


@pytest.mark.parametrize(
    "settings", [{"requests": 3}, {"input_len": 5}, {"rate": 2.0}, {"tenants": 2}, {"deadline_ms": 5.0}]
)
def test_what_a_workload_says_itself_is_not_told_beside_it(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="nothing beside workload='bursty-chat'") as refused:
        describe(SimulationConfig(workload="bursty-chat", **settings), 0, 4096)  # type: ignore[arg-type]
    assert refused.value.field in settings
