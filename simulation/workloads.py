"""Workloads that tell policies apart, by name: the same requests for the same seed.

Their rates are meant for the defaults of ``llm-engine simulate``: Llama-2-13B on four RTX 4070 with 1 Gbit/s between
them, which serve some six requests of 128 tokens in and 128 out a second and keep 20,992 tokens. ``--time-scale`` fits
them to something else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import ConfigError
from .workload import Arrival, lognormal, prompt

GREEDY_TENANT = "greedy"


@dataclass(frozen=True, slots=True)
class Workload:
    """A named one."""

    summary: str
    make: Callable[[int, int], list[Arrival]]
    """From a seed and the longest prompt and answer together; raises ``ConfigError`` where that is too short."""
    slo_ttft: float | None = None
    """Seconds to the first token that count as good."""
    slo_itl: float | None = None
    """Mean seconds between a request's tokens that do."""


def bursty_chat(seed: int, max_len: int) -> list[Arrival]:
    """Two requests a second, and every 15 s ninety more within one. A fifth is interactive: priority 0, with 4 s and
    0.15 s a token to its deadline; the others have priority 1 and twice as long."""
    rng = random.Random(seed)
    times = _stream(2.0, 0.0, 90.0, rng)
    for burst in range(6):
        times += [5.0 + 15.0 * burst + rng.random() for _ in range(90)]
    arrivals = []
    for index, at in enumerate(sorted(times)):
        input_len = _drawn(200, 20, 1000, rng)
        output_len = _drawn(100, 5, 500, rng)
        is_interactive = rng.random() < 0.2
        deadline = (4.0 + 0.15 * output_len) * (1 if is_interactive else 2)
        priority = 0 if is_interactive else 1
        arrivals.append(Arrival(at, prompt(index, input_len), output_len, priority=priority, deadline=deadline))
    return _checked("bursty-chat", arrivals, max_len)


def long_documents(seed: int, max_len: int) -> list[Arrival]:
    """Questions of a line or two, and between them, one of five, documents of 2000 to 3500 tokens to sum up."""
    rng = random.Random(seed)
    arrivals = []
    for index, at in enumerate(_stream(2.5, 0.0, 80.0, rng)):
        if rng.random() < 0.2:
            arrivals.append(Arrival(at, prompt(index, rng.randint(2000, 3500)), rng.randint(150, 400)))
        else:
            arrivals.append(Arrival(at, prompt(index, _drawn(80, 10, 400, rng)), _drawn(80, 5, 300, rng)))
    return _checked("long-documents", arrivals, max_len)


def many_tenants(seed: int, max_len: int) -> list[Arrival]:
    """Eight tenants with 0.4 requests a second each, half of what can be served; one more sends ten a second."""
    rng = random.Random(seed)
    asked = [(at, f"tenant-{tenant}") for tenant in range(8) for at in _stream(0.4, 0.0, 60.0, rng)]
    asked += [(at, GREEDY_TENANT) for at in _stream(10.0, 0.0, 60.0, rng)]
    arrivals = [
        Arrival(at, prompt(index, _drawn(150, 20, 600, rng)), _drawn(80, 10, 300, rng), tenant=tenant)
        for index, (at, tenant) in enumerate(sorted(asked))
    ]
    return _checked("many-tenants", arrivals, max_len)


def shared_prefix(seed: int, max_len: int) -> list[Arrival]:
    """Thirty-two instructions of 1536 tokens, two and a half times what the cache keeps, each with short questions."""
    rng = random.Random(seed)
    arrivals = [
        Arrival(at, prompt(index, 1536 + rng.randint(20, 100), 1536, rng.randrange(32)), rng.randint(10, 60))
        for index, at in enumerate(_stream(8.0, 0.0, 50.0, rng))
    ]
    return _checked("shared-prefix", arrivals, max_len)


WORKLOADS = {
    "bursty-chat": Workload("short answers in bursts, with priorities and deadlines", bursty_chat, 4.0, 0.2),
    "long-documents": Workload("short questions among long documents", long_documents, 4.0, 0.2),
    "many-tenants": Workload("eight tenants and a greedy one", many_tenants, 4.0, 0.2),
    "shared-prefix": Workload("more shared instructions than the cache keeps", shared_prefix, 8.0, 0.2),
}


def _stream(rate: float, begin: float, end: float, rng: random.Random) -> list[float]:
    """Poisson arrivals."""
    times, at = [], begin + rng.expovariate(rate)
    while at < end:
        times.append(at)
        at += rng.expovariate(rate)
    return times


def _drawn(mean: float, low: int, high: int, rng: random.Random) -> int:
    return min(max(lognormal(mean, 0.8, rng), low), high)


def _checked(name: str, arrivals: list[Arrival], max_len: int) -> list[Arrival]:
    longest = max(arrival.num_tokens for arrival in arrivals)
    if longest > max_len:
        raise ConfigError("workload", name, f"one for a context of {max_len} tokens; it has requests of {longest}")
    return arrivals
