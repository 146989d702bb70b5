"""Who asks for what and when."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come."""

    at: float
    """Seconds from the beginning."""
    prompt_token_ids: Sequence[int]
    output_len: int


def token_ids(request: int, length: int) -> list[int]:
    """A prompt unlike every other one: its first token is its own, so no block of it is found in another's."""
    return [1 + request, *([0] * (length - 1))] if length else []


def fixed(
    num_requests: int, input_len: int, output_len: int, *, rate: float = math.inf, seed: int = 0
) -> list[Arrival]:
    """All alike, at once or as a Poisson stream of ``rate`` requests a second."""
    times = poisson(num_requests, rate, random.Random(seed))
    return [Arrival(at, token_ids(index, input_len), output_len) for index, at in enumerate(times)]


def poisson(num_requests: int, rate: float, rng: random.Random) -> list[float]:
    """Times of arrival; all zero for an infinite rate."""
    if rate == math.inf:
        return [0.0] * num_requests
    times, at = [], 0.0
    for _ in range(num_requests):
        at += rng.expovariate(rate)
        times.append(at)
    return times
