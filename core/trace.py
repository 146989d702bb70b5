"""What one step did and when: the record behind ``llm.get_stats()``, the step trace and the live metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepStats:
    """One micro-batch, noted when it retires. Times are seconds on ``time.monotonic`` of the engine's host.

    In order: ``began_at``, ``booked_at``, ``pushed_at``, the ``busy`` spans stage by stage, ``collected_at``,
    ``update_at``, ``retired_at``.
    """

    epoch: int
    """Rises each time the stages are started anew."""
    step: int
    queue: int
    num_decodes: int
    num_chunks: int
    num_tokens: int
    context_tokens: int
    """Sum over the tokens of the positions each attended to."""
    kv_tokens: int
    """Sum over the rows of the cached positions each read."""
    num_sampled: int
    ahead: bool
    """Whether it was pushed before the tokens of the queue's last step were known."""
    num_paused: int
    num_resumed: int
    num_finished: int
    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of the pool's blocks that requests hold, 0..1."""
    began_at: float
    """The scheduling thread had the lock and began to drain and schedule."""
    booked_at: float
    """The plan was checked and booked."""
    pushed_at: float
    """The executor had taken the plan."""
    collected_at: float
    """The output thread had the result in hand."""
    update_at: float
    """It had the lock."""
    retired_at: float
    """The books were up to date."""
    busy: tuple[tuple[float, float], ...] = ()
    """Per stage: when its forward began and ended."""
    failed: bool = False
    after_idle: bool = False
    """Nobody was there to be served before this step's requests came: the pipeline fills with it. Stages that stood
    still until then had nothing to do."""

    @property
    def step_seconds(self) -> float:
        """From push to retirement."""
        return self.retired_at - self.booked_at
