"""The main thread's loop of a stage process: receive, execute, hand on."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..core.step import StepPlan, StepResult
from .control_link import ControlLink
from .links import Inbound, Outbound, PeerError
from .ring import Ring
from .stage import Stage, StageOutput
from .tensors import describe_tensor, tensor_bytes, tensor_from
from .wire import (
    FED,
    PLAN,
    PROBE,
    RESULT,
    RING,
    STOP,
    Fed,
    Kind,
    OutputHead,
    PlanBounds,
    WireError,
    decode_fed,
    decode_output_head,
    decode_plan,
    encode_fed,
    encode_output_head,
    encode_result,
)


@dataclass(slots=True)
class _Work:
    plan: StepPlan
    frames: list[memoryview]
    """The plan as it came."""
    received: StageOutput | None


class StageRunner:
    """Runs one stage on what its inbound socket brings.

    Sampled tokens go from the last stage to the first: by the ``ring`` that both have an end of, or else by
    ``far_ring``, which only the last one has, to the first one's inbound socket. Other stages have neither.
    """

    def __init__(
        self,
        stage: Stage,
        inbound: Inbound,
        outbound: Outbound,
        ring: Ring | None,
        far_ring: Outbound | None,
        bounds: PlanBounds,
        link: ControlLink,
    ) -> None:
        self._stage, self._inbound, self._outbound = stage, inbound, outbound
        self._ring, self._far_ring = ring, far_ring
        self._bounds, self._link = bounds, link
        self._held: deque[_Work] = deque()
        """Plans made ahead of tokens that have not been fed yet, and those behind them."""

    def serve(self) -> None:
        """Until the stage is told to stop. Raises for what no stage can go on after."""
        while self._take_next():
            while self._held and self._stage.can_execute(self._held[0].plan):
                self._execute(self._held.popleft())

    def _take_next(self) -> bool:
        """Wait for something, and enter it; false when the stage is to stop."""
        ring = self._ring
        if ring is not None and not self._stage.is_last:
            # A plan that is held waits for tokens and nothing else. Where none is, tokens are taken before others wait.
            while (frame := ring.receive(wait=bool(self._held))) is not None:
                self._feed(frame)
                if self._held:
                    return True
        # In the socket itself, not in a poller beside it: that takes longer to wake up, and the next stage waits.
        received = self._inbound.receive(wait=True)
        if received is None:
            return True
        kind, buffers = received
        if kind is STOP and self._link.stopped is not None:
            return False
        try:
            self._take(kind, buffers)
        except PeerError:
            raise
        except WireError as error:
            raise PeerError(self._inbound.sender(kind), str(error)) from error
        return True

    def _take(self, kind: Kind, buffers: list[memoryview]) -> None:
        if kind is PLAN:
            self._held.append(self._work(buffers))
        elif kind is FED:
            self._feed(_only(buffers))
        elif kind is RING:
            self._outbound.send(PROBE, b"back")
        elif kind is PROBE:
            self._pass_probe(bytes(_only(buffers)))
        else:
            raise WireError(f"a {kind.name} message, and nobody stops this stage")

    def _feed(self, frame: memoryview) -> None:
        try:
            fed = decode_fed(frame, self._bounds)
            try:
                self._stage.feed(fed.step, fed.tokens)
            except (KeyError, IndexError, ValueError) as error:
                raise WireError(f"{len(fed.tokens)} tokens of step {fed.step} are not what is awaited") from error
        except WireError as error:
            raise PeerError(self._inbound.sender(FED), str(error)) from error

    def _work(self, buffers: list[memoryview]) -> _Work:
        if len(buffers) != (2 if self._stage.index == 0 else 4):
            raise WireError(f"a plan of {len(buffers)} frames")
        plan = decode_plan(buffers[0], buffers[1], self._bounds)
        if self._stage.index == 0:
            return _Work(plan, buffers, None)
        head = decode_output_head(buffers[2])
        if len(head.busy) != self._stage.index:
            raise WireError(f"{len(head.busy)} times of {self._stage.index} stages")
        hidden = (
            None if head.error is not None else tensor_from(buffers[3], head, plan.num_tokens, self._bounds.hidden_size)
        )
        return _Work(plan, buffers[:2], StageOutput(hidden, head.busy, head.error))

    def _execute(self, work: _Work) -> None:
        self._link.executing = (work.plan.step, time.monotonic())
        output = self._stage.execute(work.plan, work.received)
        if isinstance(output, StepResult):
            if self._ring is not None:
                self._ring.send(encode_fed(Fed(output.step, output.tokens)))
            elif self._far_ring is not None:
                self._far_ring.send(FED, encode_fed(Fed(output.step, output.tokens)))
            self._stage.catch_up()  # meanwhile the first stage begins; the result may wake others on its CPU
            self._outbound.send(RESULT, encode_result(output))
        else:
            self._outbound.send(PLAN, *work.frames, *_output_frames(output))
        self._link.executing = None

    def _pass_probe(self, round: bytes) -> None:
        """A probe passes every link: over a ring of sockets it goes round once more before it ends at the engine."""
        if self._far_ring is not None and round == b"out":
            self._far_ring.send(RING, b"")
        else:
            self._outbound.send(PROBE, round)


def _output_frames(output: StageOutput) -> list[Any]:
    if output.hidden is None:
        return [encode_output_head(OutputHead(output.busy, output.error)), b""]
    library, dtype, shape = describe_tensor(output.hidden)
    # The frame is a copy, since the stage may overwrite its own buffer while this one is still being written out.
    return [
        encode_output_head(OutputHead(output.busy, None, library, dtype, shape)),
        tensor_bytes(output.hidden),
    ]


def _only(buffers: list[memoryview]) -> memoryview:
    if len(buffers) != 1:
        raise WireError(f"{len(buffers)} frames where one is due")
    return buffers[0]
