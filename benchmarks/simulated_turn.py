"""One engine, one mix, once: what ``benchmarks.simulated`` runs in a process of its own.

    python -m benchmarks.simulated_turn '{"settings": {...}, "arrivals": [[0.0, 128, 32]], "seed": 1, "trace": null}'

prints one JSON line.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

from benchmarks.workloads import HIGHEST_ID, LOWEST_ID


def main() -> int:
    """Run the task on the command line."""
    task = json.loads(sys.argv[1])
    from llm_engine import LLM

    rng = random.Random(task["seed"])
    with LLM(**task["settings"], trace=task["trace"]) as llm:
        serve(llm, [(0.0, 40, 6)] * 12, rng)  # what is slow the first time is over
        time.sleep(0.2)
        print(json.dumps(serve(llm, task["arrivals"], rng)), flush=True)
    return 0


def serve(llm: Any, arrivals: list[tuple[float, int, int]], rng: random.Random) -> dict[str, float]:
    """Submit each request when it is due; seconds until the last answer, and to the first tokens in the mean."""
    from llm_engine import SamplingParams

    asked = [
        (
            at,
            [rng.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(input_len)],
            SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False),
        )
        for at, input_len, output_len in arrivals
    ]
    began = time.monotonic()
    futures = []
    for at, token_ids, params in asked:
        time.sleep(max(0.0, began + at - time.monotonic()))
        futures.append(llm.submit(token_ids, params))
    outputs = [future.result(timeout=600) for future in futures]
    return {
        "seconds": max(output.metrics.last_token for output in outputs) - began,
        "ttft_s": statistics.fmean(output.metrics.first_token - output.metrics.arrival for output in outputs),
    }


if __name__ == "__main__":
    sys.exit(main())
