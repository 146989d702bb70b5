"""The offline workloads and their prompts of random ids: one definition for every contender.

Standard library only: the peers' environments import it, and they hold nothing of ours. ``llm-engine bench offline``
makes the same prompts from the same seed; a test compares the two.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LOWEST_ID, HIGHEST_ID = 100, 31_000


@dataclass(frozen=True, slots=True)
class Workload:
    """How many requests of how many tokens. All are submitted at once."""

    requests: int
    shared: int
    """Leading prompt tokens that all requests have in common; no earlier run has left them in a cache."""
    own: int
    output: int

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache when all requests are at their end, the shared ones counted once."""
        return self.shared + self.requests * (self.own + self.output)


WORKLOADS = {
    "W1": Workload(64, 0, 128, 128),
    "W2": Workload(1, 0, 128, 128),
    "W3": Workload(16, 0, 1024, 16),
    "W4": Workload(32, 768, 32, 32),
}


def make_prompts(workload: Workload, seed: int) -> list[list[int]]:
    """Prompts of ids from ``[LOWEST_ID, HIGHEST_ID)``, the same for the same seed."""
    # The text that seeds the generator is part of the definition: the engine's command spells it the same way.
    source = random.Random(f"{workload} {seed}")

    def ids(count: int) -> list[int]:
        return [source.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count)]

    shared = ids(workload.shared)
    return [shared + ids(workload.own) for _ in range(workload.requests)]


def warm_up_seed(repeat: int) -> int:
    """Seed of the run that is thrown away: the same workload, other tokens."""
    return 2 * repeat


def measured_seed(repeat: int) -> int:
    """Seed of the run that counts."""
    return 2 * repeat + 1
