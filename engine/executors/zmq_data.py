"""The engine's two ends of the data sockets: plans go out, results come in."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import zmq

from ...core.step import StepPlan, StepResult
from ...workers.links import Inbound, Outbound
from ...workers.wire import Kind, WireError, decode_result, encode_plan


@dataclass(slots=True)
class InFlight:
    """A plan that was sent and has not come back."""

    step: int
    num_sampled: int
    sent_at: float


class PlanSender:
    """The way to the first stage, shared by the scheduling thread, which pushes, and the output thread, which makes and
    closes it. The lock passes the socket between them; it is never held for longer than a send, which does not block.
    """

    def __init__(self, outbound: Outbound, epoch: int, in_flight: deque[InFlight]) -> None:
        self._lock = threading.Lock()
        self._outbound: Outbound | None = outbound
        self._epoch = epoch
        self._in_flight = in_flight

    def send(self, plan: StepPlan) -> None:
        """Any thread. Plans of another epoch, or after ``close``, are dropped."""
        if plan.epoch != self._epoch:
            return
        frames = encode_plan(plan)
        sent = InFlight(plan.step, plan.num_sampled, time.monotonic())
        with self._lock:
            if self._outbound is not None:
                self._in_flight.append(sent)
                self._outbound.send(Kind.PLAN, *frames)

    def probe(self) -> None:
        """Send something round that tries every link."""
        with self._lock:
            if self._outbound is not None:
                self._outbound.send(Kind.PROBE, b"out")

    def close(self) -> None:
        """Callable twice."""
        with self._lock:
            if self._outbound is not None:
                self._outbound.close()
                self._outbound = None


class Results:
    """What the last stage sends; owned by the output thread."""

    def __init__(self, inbound: Inbound, epoch: int, num_stages: int, in_flight: deque[InFlight]) -> None:
        self._inbound = inbound
        self._epoch, self._num_stages = epoch, num_stages
        self._in_flight = in_flight
        self.vocab_size = 0

    @property
    def socket(self) -> zmq.Socket[Any]:
        return self._inbound.socket

    def take(self) -> StepResult | Kind | None:
        """The next result, ``Kind.PROBE`` for the probe, ``None`` where nothing has come; raises ``WireError``."""
        received = self._inbound.receive()
        if received is None:
            return None
        kind, buffers = received
        if len(buffers) != 1:
            raise WireError(f"{len(buffers)} frames where one is due")
        if kind is Kind.PROBE:
            return Kind.PROBE
        result = decode_result(buffers[0])
        self._check(result)
        return result

    def close(self) -> None:
        self._inbound.close()

    def _check(self, result: StepResult) -> None:
        """Raise ``WireError`` unless it answers the oldest plan in flight."""
        if not self._in_flight:
            raise WireError(f"a result of step {result.step}, which nobody asked for")
        due = self._in_flight.popleft()
        if (result.epoch, result.step) != (self._epoch, due.step):
            raise WireError(f"a result of step {result.epoch}/{result.step} where {self._epoch}/{due.step} is due")
        if len(result.tokens) != (0 if result.error is not None else due.num_sampled):
            raise WireError(f"{len(result.tokens)} tokens for {due.num_sampled} rows")
        tokens = result.tokens
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise WireError(f"tokens from {min(tokens)} to {max(tokens)} of a vocabulary of {self.vocab_size}")
        if len(result.busy) != self._num_stages:
            raise WireError(f"times of {len(result.busy)} stages, not {self._num_stages}")


def on_engines_clock(result: StepResult, offsets: list[float]) -> StepResult:
    """With the times of each stage's clock brought to the engine's."""
    busy = [(began - offset, ended - offset) for (began, ended), offset in zip(result.busy, offsets, strict=True)]
    return replace(result, busy=busy)
