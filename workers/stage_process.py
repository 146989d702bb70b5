"""A stage in a process of its own: ``python -m llm_engine.workers.stage_process``, started by the engine.

The main thread loads the model and executes plans; the side thread (``control_link``) speaks to the engine. The first
line on standard input says whom to join (``control.Launch``); its end is the end of the stage.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from ..core.step import StepPlan, StepResult
from .control import Allocate, Launch, Loaded, Progress, Ready, Setup
from .control_link import ControlLink, LogToEngine, StoppedError
from .links import Inbound, Outbound, PeerError, Received, data_socket
from .model_engine import ModelEngine
from .model_engine import Progress as OnProgress
from .stage import Stage, StageOutput
from .stage_model import imported, make_torch_engine, memory_name
from .tensors import describe_tensor, tensor_bytes, tensor_from
from .wire import (
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

PROGRESS_SECONDS = 0.05
"""Least time between two reports of loading."""


def main() -> None:
    """Run the stage; does not return."""
    faulthandler.enable()
    line = os.read(sys.stdin.fileno(), 65536)
    if not line:
        os._exit(1)  # the engine died meanwhile
    launch = msgspec.json.decode(line, type=Launch)
    if launch.cpus:
        os.sched_setaffinity(0, launch.cpus)  # before torch: the threads it starts inherit it
    context: zmq.Context[Any] = zmq.Context()
    link = ControlLink(launch, context)
    logging.basicConfig(handlers=[LogToEngine(link)], level=launch.log_level, format="%(message)s")
    link.start()
    code = 0
    try:
        run(launch, link, context)
    except StoppedError as stopped:
        logging.getLogger(__name__).debug("%s", stopped)
    except BaseException as error:  # noqa: BLE001 - told to the engine
        link.fail(error)
        code = 1
    link.close()
    sys.stderr.flush()
    # Not through the interpreter's own end: libraries' threads and device contexts may take seconds over it.
    os._exit(code)


def run(launch: Launch, link: ControlLink, context: zmq.Context[Any]) -> None:
    """From the settings to the last plan."""
    setup: Setup = link.expect(Setup)
    socket = data_socket(context, zmq.PULL)
    socket.bind(setup.inbound)
    num_stages = setup.num_stages
    feeds_back = setup.config.scheduler.schedule_ahead
    stage = Stage(
        make_model_engine(setup, launch.num_threads),
        imported(setup.sampler),
        index=setup.index,
        num_stages=num_stages,
        max_num_seqs=setup.config.scheduler.max_num_seqs,
        feeds_back=feeds_back,
    )
    try:
        info = stage.load(_reporting(link))
        link.send(Loaded(info, socket.getsockopt_string(zmq.LAST_ENDPOINT), memory_name(setup.on_cuda)))
        pool: Allocate = link.expect(Allocate)
        stage.allocate(pool.num_blocks, pool.block_size)
        senders = dict.fromkeys((Kind.PLAN, Kind.PROBE), setup.index - 1)
        if setup.index == 0 and feeds_back and num_stages > 1:
            senders[Kind.FED] = senders[Kind.RING] = num_stages - 1
        bounds = PlanBounds(setup.config.scheduler.max_num_seqs, info.max_model_len, info.vocab_size, pool.num_blocks)
        runner = StageRunner(
            stage,
            Inbound(socket, setup.token, senders),
            _connected(context, pool.next_address, setup.token),
            None if pool.first_address is None else _connected(context, pool.first_address, setup.token),
            bounds,
            link,
        )
        link.send(Ready())
        runner.serve()
    finally:
        stage.release()


@dataclass(slots=True)
class _Work:
    plan: StepPlan
    frames: list[Any]
    """The plan as it came."""
    received: StageOutput | None


class StageRunner:
    """The main thread's loop: receive, execute, hand on."""

    def __init__(
        self,
        stage: Stage,
        inbound: Inbound,
        outbound: Outbound,
        ring: Outbound | None,
        bounds: PlanBounds,
        link: ControlLink,
    ) -> None:
        self._stage, self._inbound, self._outbound, self._ring = stage, inbound, outbound, ring
        self._bounds, self._link = bounds, link
        self._held: deque[_Work] = deque()
        """Plans made ahead of tokens that have not been fed yet, and those behind them."""

    def serve(self) -> None:
        """Until the stage is told to stop. Raises for what no stage can go on after."""
        poller = zmq.Poller()
        poller.register(self._inbound.socket, zmq.POLLIN)
        poller.register(self._link.stop_fd, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._link.stop_fd in ready:
                return
            received = self._inbound.receive()
            if received is not None:
                try:
                    self._take(received)
                except PeerError:
                    raise
                except WireError as error:
                    raise PeerError(self._inbound.sender(received.kind), str(error)) from error
                while self._held and self._stage.can_execute(self._held[0].plan):
                    self._execute(self._held.popleft())

    def _take(self, received: Received) -> None:
        buffers = [frame.buffer for frame in received.frames]
        if received.kind is Kind.PLAN:
            self._held.append(self._work(received.frames, buffers))
        elif received.kind is Kind.FED:
            fed = decode_fed(_only(buffers), self._bounds)
            self._stage.feed(fed.step, fed.tokens)
        elif received.kind is Kind.RING:
            self._outbound.send(Kind.PROBE, [b"back"])
        else:
            self._pass_probe(bytes(_only(buffers)))

    def _work(self, frames: list[Any], buffers: list[memoryview]) -> _Work:
        if len(frames) != (2 if self._stage.index == 0 else 4):
            raise WireError(f"a plan of {len(frames)} frames")
        plan = decode_plan(buffers[0], buffers[1], self._bounds)
        if self._stage.index == 0:
            return _Work(plan, frames, None)
        head = decode_output_head(buffers[2])
        if len(head.busy) != self._stage.index:
            raise WireError(f"{len(head.busy)} times of {self._stage.index} stages")
        hidden = None if head.error is not None else tensor_from(buffers[3], head, plan.num_tokens)
        return _Work(plan, frames[:2], StageOutput(hidden, head.busy, head.error))

    def _execute(self, work: _Work) -> None:
        self._link.executing = (work.plan.step, time.monotonic())
        output = self._stage.execute(work.plan, work.received)
        if isinstance(output, StepResult):
            if self._ring is not None:
                self._ring.send(Kind.FED, [encode_fed(Fed(output.step, output.tokens))])
            self._outbound.send(Kind.RESULT, [encode_result(output)])
        else:
            self._outbound.send(Kind.PLAN, [*work.frames, *_output_frames(output)])
        self._link.executing = None

    def _pass_probe(self, round: bytes) -> None:
        """A probe passes every link: where there is a ring it goes round once more before it ends at the engine."""
        if self._ring is not None and round == b"out":
            self._ring.send(Kind.RING, [])
        else:
            self._outbound.send(Kind.PROBE, [round])


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


def _connected(context: zmq.Context[Any], address: str, token: bytes) -> Outbound:
    socket = data_socket(context, zmq.PUSH)
    socket.connect(address)
    return Outbound(socket, token)


def make_model_engine(setup: Setup, num_threads: int | None) -> ModelEngine:
    """The model engine that the settings ask for."""
    if setup.model_engine is not None:
        return imported(setup.model_engine)(setup.index)
    assert setup.model_path is not None
    return make_torch_engine(
        setup.config, setup.model_path, setup.index, on_cuda=setup.on_cuda, num_threads=num_threads
    )


def _reporting(link: ControlLink) -> OnProgress:
    """Tells the engine of loading, now and then and at the end."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= PROGRESS_SECONDS:
            last = now
            link.send(Progress(done, total))

    return report


if __name__ == "__main__":
    main()
