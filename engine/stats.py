"""What one step did, for ``llm.get_stats()`` and the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepStats:
    """One micro-batch, noted when it retires. Seconds; times on ``time.monotonic``."""

    step: int
    queue: int
    num_decodes: int
    num_chunks: int
    num_tokens: int
    num_paused: int
    num_resumed: int
    num_finished: int
    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of the pool's blocks that requests hold, 0..1."""
    pushed_at: float
    retired_at: float
    schedule_seconds: float
    """Drain, schedule, check and book, under the lock."""
    update_seconds: float
    """Retiring, under the lock."""
    busy: tuple[tuple[float, float], ...] = ()
    """Per stage: when its forward began and ended."""
    failed: bool = False

    @property
    def step_seconds(self) -> float:
        """From push to retirement."""
        return self.retired_at - self.pushed_at
