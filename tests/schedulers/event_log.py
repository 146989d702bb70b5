"""One log of events, fed to every scheduler: ``python -m tests.schedulers.event_log SEED`` prints, as JSON, a digest of
each plan that each of them made of it."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

from tests.engine.test_core_properties import FAMILIES
from tests.schedulers.lives import live, make_driver
from tests.schedulers.triples import TRIPLES, Triple

SHAPE = {
    "num_queues": 3, "num_stages": 2, "look_ahead": 1, "num_tokens": 64, "block_size": 2, "max_num_seqs": 6,
    "max_micro_batch_seqs": 4, "max_num_batched_tokens": 12, "places": 5,
}  # fmt: skip


def event_log(seed: int, length: int = 40) -> list[Any]:
    """Actions as ``lives.live`` takes them."""
    rng = random.Random(seed)
    log: list[Any] = []
    for _ in range(length):
        match rng.randrange(20):
            case 0:
                log.append(("abort", rng.randrange(40)))
            case 1 if rng.random() < 0.3:
                log.append(("die",))
                log.append(("come back",))
            case 2 if rng.random() < 0.3:
                log.append(("fail", 1, rng.randrange(2)))
            case number if number < 9:
                tail = [rng.randrange(97) for _ in range(rng.randrange(6))]
                prompt = rng.choice(FAMILIES)[: rng.randint(1, 12)] + tail
                wish = {
                    "stop_ids": rng.choice([(), tuple(range(0, 97, 9))]), "salt": rng.choice([None, None, "salt"]),
                    "priority": rng.choice([-1, 0, 0, 3]), "tenant": rng.choice([None, "ann", "bob", "cy", "dan"]),
                    "within": rng.choice([None, 5.0, 60.0, 1000.0]),
                }  # fmt: skip
                log.append(("add", prompt, rng.randint(1, 16), wish))
            case number if number < 14:
                log.append(("schedule", rng.randint(1, 4)))
            case _:
                log.append(("retire", rng.randint(1, 3)))
    return log


def plans_of(triple: Triple, log: list[Any]) -> list[str]:
    driver = make_driver(triple, **SHAPE)
    live(driver, log)
    return [hashlib.sha256(repr(plan).encode()).hexdigest()[:16] for plan in driver.pushed]


if __name__ == "__main__":
    log = event_log(int(sys.argv[1]))
    json.dump({str(triple): plans_of(triple, log) for triple in TRIPLES}, sys.stdout)
