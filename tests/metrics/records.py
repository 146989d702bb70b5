"""Step records made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_engine.core.trace import StepStats

PLAIN = StepStats(
    epoch=0, step=1, queue=0, num_decodes=1, num_chunks=0, num_tokens=1, context_tokens=1, kv_tokens=1, num_sampled=1,
    ahead=False, num_paused=0, num_resumed=0, num_finished=0, num_running=1, num_waiting=0, kv_usage=0.0,
    began_at=0.0, booked_at=0.0, pushed_at=0.0, collected_at=0.0, update_at=0.0, retired_at=0.0,
)  # fmt: skip


def step(
    number: int,
    *busy: tuple[float, float],
    began: float | None = None,
    tokens: int = 1,
    chunk: int = 0,
    **more: Any,
) -> StepStats:
    """A step of the given busy spans, one per stage; ``chunk`` of its ``tokens`` are a prompt's.

    Scheduling takes 2 from ``began`` on and the push 1; absent, they end just when the first stage begins. Collecting
    takes 1, the lock 1, the update 2.
    """
    began = busy[0][0] - 3.0 if began is None else began
    end = busy[-1][1] if busy else began + 2.0
    return replace(
        PLAIN,
        step=number,
        busy=busy,
        num_tokens=tokens,
        num_decodes=tokens - chunk,
        num_chunks=int(chunk > 0),
        began_at=began,
        booked_at=began + 2.0,
        pushed_at=began + 3.0,
        collected_at=end + 1.0,
        update_at=end + 2.0,
        retired_at=end + 4.0,
        **more,
    )
