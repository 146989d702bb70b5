"""Two tenants at one server that is fair: what the greedy one does to the other, as /metrics tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Server, serving

NUM_GREEDY, NUM_MODEST, NUM_TOKENS = 40, 4, 50


@pytest.fixture
def fair(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, "--scheduler", "fair", "--max-num-seqs", "2") as server:
        yield server
        assert server.stop() == 0


def mean(server: Server, name: str, tenant: str) -> float:
    return server.metric(f"{name}_sum", tenant=tenant) / server.metric(f"{name}_count", tenant=tenant)


def wait_until_all_came(server: Server, count: int) -> None:
    deadline = time.monotonic() + 20
    names = "num_requests_waiting", "num_requests_running", "requests_finished_total"
    while sum(map(server.metric, names)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_greedy_tenant_does_not_make_the_other_wait_behind_all_it_sent(fair: Server) -> None:
    answered: list[str] = []

    def ask(tenant: str, number: int) -> None:
        body = {
            "prompt": f"{number} + {number} =", "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0,
            "user": tenant,
        }  # fmt: skip
        assert fair.request("POST", "/v1/completions", body)[0] == 200
        answered.append(tenant)

    def start(tenant: str, count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=ask, args=(tenant, number)) for number in range(count)]
        for thread in threads:
            thread.start()
        return threads

    greedy = start("greedy", NUM_GREEDY)
    wait_until_all_came(fair, NUM_GREEDY)
    modest = start("modest", NUM_MODEST)
    for thread in greedy + modest:
        thread.join(60)
        assert not thread.is_alive()
    assert answered.count("greedy") == NUM_GREEDY
    assert answered.count("modest") == NUM_MODEST

    # In turn, as long as both wait: its last answer comes long before those of who had sent ten times as many earlier.
    behind = answered[len(answered) - answered[::-1].index("modest") :]
    assert len(behind) >= NUM_GREEDY // 4
    for name in ("tenant_time_to_first_token_seconds", "tenant_request_queue_time_seconds"):
        assert mean(fair, name, "modest") < mean(fair, name, "greedy") / 1.5
    for tenant, count in (("greedy", NUM_GREEDY), ("modest", NUM_MODEST)):
        assert fair.metric("tenant_requests_finished_total", tenant=tenant) == count
        assert fair.metric("tenant_generation_tokens_total", tenant=tenant) == count * NUM_TOKENS
    assert fair.metric("tenant_generation_tokens_total") == fair.metric("generation_tokens_total")
    assert fair.metric("priority_requests_finished_total", priority="0") == NUM_GREEDY + NUM_MODEST
