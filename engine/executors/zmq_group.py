"""The stage processes of one epoch: how they are brought up, watched, and taken down.

Everything here belongs to the output thread, but for ``PlanSender``. Nothing blocks: ``take_control``, ``take_result``
and ``look`` are called when there is something to take, or from time to time.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from ...core.config import EngineConfig
from ...core.errors import EngineDeadError
from ...core.step import StepPlan, StepResult
from ...core.version import __version__
from ...workers.control import (
    Allocate,
    Failed,
    FromStage,
    Heartbeat,
    Hello,
    Launch,
    Loaded,
    Log,
    Message,
    Progress,
    Ready,
    Refused,
    Serving,
    Setup,
    decode_from_stage,
    encode,
)
from ...workers.links import Inbound, Outbound, PeerError, data_socket
from ...workers.placement import StagePlacement
from ...workers.wire import TOKEN_BYTES, WIRE_VERSION, Kind, WireError, decode_result, encode_plan
from .base import ExecutorInfo
from .pool import choose_num_blocks, sum_up
from .zmq_addresses import SocketFolder
from .zmq_process import StageProcess
from .zmq_stage import StageRecord, combined_progress, error_of

logger = logging.getLogger(__name__)

GRACE_SECONDS = 0.3
"""How long a process may take to end by itself before it is killed."""
_AWAY_SECONDS = 1.0
"""Longer between two looks, and the stages' silence is not theirs."""


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What all stages of an executor are made from."""

    config: EngineConfig
    block_size: int
    on_cuda: bool
    model_path: str | None
    model_engine: str | None
    sampler: str
    fingerprint: str | None
    placements: Sequence[StagePlacement]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group is of no further use."""

    stage: int
    cause: str
    error: BaseException
    """For whoever waits for the start."""


@dataclass(slots=True)
class InFlight:
    """A plan that was sent and has not come back."""

    step: int
    num_sampled: int


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
        sent = InFlight(plan.step, plan.num_sampled)
        with self._lock:
            if self._outbound is not None:
                self._in_flight.append(sent)
                self._outbound.send(Kind.PLAN, frames)

    def probe(self) -> None:
        with self._lock:
            if self._outbound is not None:
                self._outbound.send(Kind.PROBE, [b"out"])

    def close(self) -> None:
        """Callable twice."""
        with self._lock:
            if self._outbound is not None:
                self._outbound.close()
                self._outbound = None


class StageGroup:
    """One start of all stages, for one epoch. Raises ``ConfigError`` where it cannot even begin."""

    def __init__(
        self,
        settings: StageSettings,
        context: zmq.Context[Any],
        epoch: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.epoch = epoch
        self.info: ExecutorInfo | None = None
        """Set once all stages serve."""
        self.failure: Failure | None = None
        self.sender: PlanSender | None = None
        self._settings = settings
        self._context = context
        self._on_progress = on_progress
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._num_stages = settings.config.parallel.pipeline_parallel_size
        self._in_flight: deque[InFlight] = deque()
        self._kill_at: float | None = None
        self._looked_at = time.monotonic()
        self._num_blocks = 0
        self.stages = [StageRecord(index) for index in range(self._num_stages)]
        self._by_identity: dict[bytes, StageRecord] = {}
        self._folder = SocketFolder()
        self.control = data_socket(context, zmq.ROUTER)
        last = self._num_stages - 1
        self._results_in = Inbound(data_socket(context, zmq.PULL), self._token, {Kind.RESULT: last, Kind.PROBE: last})
        try:
            self.control.bind(self._folder.address("control"))
            self.results.bind(self._folder.address("results"))
            for stage in self.stages:
                stage.process = StageProcess(self._launch(stage.index))
                stage.heard_at = time.monotonic()
        except BaseException:
            self.begin_end()
            self.end(0.0)
            raise

    @property
    def results(self) -> zmq.Socket[Any]:
        return self._results_in.socket

    def pidfds(self) -> list[int]:
        """Turn readable when a process ends."""
        return [s.process.pidfd for s in self.stages if s.process is not None and s.process.pidfd is not None]

    # -- what arrives

    def take_control(self) -> None:
        """Read every control message that is there."""
        while True:
            try:
                frames = self.control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or frames[1] != self._token:
                logger.warning("a control message from a stranger was dropped")
                continue
            try:
                message = decode_from_stage(frames[2])
            except WireError as error:
                stage = self._by_identity.get(frames[0])
                if stage is None:
                    logger.warning("a control message from a stranger was dropped: %s", error)
                else:
                    self.fail(stage.index, f"stage {stage.index} sent nonsense: {error}")
                continue
            if self.failure is None:
                self._take(frames[0], message)

    def take_result(self) -> StepResult | None:
        """The next result that has arrived; ``None`` where there is none."""
        if self.failure is not None:
            return None
        last = self._num_stages - 1
        try:
            received = self._results_in.receive()
            if received is None:
                return None
            if len(received.frames) != 1:
                raise WireError(f"{len(received.frames)} frames where one is due")
            if received.kind is Kind.PROBE:
                self._serve()
                return None
            result = decode_result(received.frames[0].buffer)
            self._check(result)
        except WireError as error:
            self.fail(last, f"stage {last} sent nonsense: {error}")
            return None
        return result

    def look(self, now: float, patience: float) -> None:
        """See whether every process lives and is well, by what they have said so far."""
        self.take_control()
        away, self._looked_at = now - self._looked_at, now
        for stage in self.stages:
            if away > _AWAY_SECONDS:
                stage.heard_at += away  # nobody could have been heard: this process was held up itself
            if self.failure is not None:
                return
            ended = stage.process.poll() if stage.process is not None else None
            if ended is not None:
                self.fail(stage.index, ended)
                return
            ailment = stage.ailment(now, serving=self.info is not None, patience=patience)
            if ailment is not None:
                self.fail(stage.index, ailment)

    def fail(self, stage: int, cause: str, error: BaseException | None = None) -> None:
        """The first failure counts; the stages' books are void from then on."""
        if self.failure is None:
            self.failure = Failure(stage, cause, error or EngineDeadError(f"stage {stage} died: {cause}"))
            self.begin_end()

    # -- the end

    def begin_end(self) -> None:
        """Ask every process to end, and drop what is under way. Callable twice."""
        if self._kill_at is not None:
            return
        self._kill_at = time.monotonic() + GRACE_SECONDS
        if self.sender is not None:
            self.sender.close()
        self._results_in.close()
        for stage in self.stages:
            if stage.process is not None:
                stage.process.ask_to_end()
        self._folder.remove()

    def end(self, seconds: float) -> bool:
        """Wait for the processes' end at most so long, killing those that take longer than the grace.

        True once all have ended and nothing is left of the group.
        """
        assert self._kill_at is not None, "begin_end comes first"
        deadline = time.monotonic() + seconds
        processes = [stage.process for stage in self.stages if stage.process is not None]
        for process in processes:
            while not process.wait(0.0):
                now = time.monotonic()
                if now >= self._kill_at:
                    process.kill()
                if now >= deadline:
                    break
                process.wait(min(max(self._kill_at, now + 0.05), deadline) - now)
        if not all(process.ended for process in processes):
            return False
        self.control.close(0)
        self._folder.remove()
        return True

    # -- its own

    def _launch(self, index: int) -> Launch:
        placement = self._settings.placements[index]
        return Launch(
            control=self._folder.address("control"),
            token=self._token.hex(),
            index=index,
            parent_pid=os.getpid(),
            directory=self._folder.path,
            cpus=None if placement.cpus is None else sorted(placement.cpus),
            num_threads=placement.num_threads,
            log_level=logging.getLogger("llm_engine").getEffectiveLevel(),
        )

    def _say(self, stage: StageRecord, message: Message) -> None:
        assert stage.identity is not None
        self.control.send_multipart([stage.identity, encode(message)], zmq.NOBLOCK)

    def _take(self, identity: bytes, message: FromStage) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
            return
        stage = self._by_identity.get(identity)
        if stage is None:
            logger.warning("a control message from a stranger was dropped: %s", type(message).__name__)
            return
        stage.heard_at = time.monotonic()
        if isinstance(message, Heartbeat):
            stage.executing = message
        elif isinstance(message, Progress):
            stage.progress = (message.done, message.total)
            self._report_progress()
        elif isinstance(message, Log):
            logging.getLogger(message.logger).log(message.level, "stage %d: %s", stage.index, message.text)
        elif isinstance(message, Failed):
            self._take_failure(stage.index, message)
        elif isinstance(message, Loaded):
            stage.info, stage.address, stage.memory = message.info, message.address, message.memory
            self._allocate()
        elif isinstance(message, Ready):
            stage.ready = True
            if all(stage.ready for stage in self.stages):
                self._probe()

    def _greet(self, identity: bytes, hello: Hello) -> None:
        problem = None
        if (hello.wire_version, hello.package_version) != (WIRE_VERSION, __version__):
            problem = (
                f"it speaks version {hello.wire_version} of llm-engine {hello.package_version}, "
                f"the engine {WIRE_VERSION} of {__version__}"
            )
        elif not 0 <= hello.index < self._num_stages:
            problem = f"there is no stage {hello.index} of {self._num_stages}"
        elif self.stages[hello.index].identity is not None:
            problem = f"stage {hello.index} is here already"
        if problem is not None:
            self.control.send_multipart([identity, encode(Refused(problem))], zmq.NOBLOCK)
            logger.error("a stage on %s (process %d) was refused: %s", hello.host, hello.pid, problem)
            return
        stage = self.stages[hello.index]
        stage.identity, stage.heard_at = identity, time.monotonic()
        self._by_identity[identity] = stage
        settings = self._settings
        self._say(
            stage,
            Setup(
                index=stage.index,
                num_stages=self._num_stages,
                epoch=self.epoch,
                token=self._token,
                config=settings.config,
                block_size=settings.block_size,
                on_cuda=settings.on_cuda,
                model_path=settings.model_path,
                model_engine=settings.model_engine,
                sampler=settings.sampler,
                fingerprint=settings.fingerprint,
                inbound=self._folder.address(f"in-{stage.index}"),
            ),
        )

    def _report_progress(self) -> None:
        progress = combined_progress(self.stages)
        if self._on_progress is not None and progress is not None:
            self._on_progress(*progress)

    def _take_failure(self, index: int, failed: Failed) -> None:
        if failed.blames is not None:
            blamed = "the engine" if failed.blames < 0 else f"stage {failed.blames}"
            cause = f"{blamed} sent nonsense to stage {index}: {failed.message}"
            self.fail(max(failed.blames, 0), cause)
        else:
            self.fail(index, f"{failed.message}\n{failed.traceback}".rstrip(), error_of(index, failed))

    def _allocate(self) -> None:
        """Once all are loaded: how large the pool is, and who follows whom."""
        infos = [stage.info for stage in self.stages if stage.info is not None]
        if len(infos) < self._num_stages:
            return
        config = self._settings.config
        try:
            num_blocks = choose_num_blocks(
                infos,
                [stage.memory for stage in self.stages],
                block_size=self._settings.block_size,
                max_num_seqs=config.scheduler.max_num_seqs,
                num_kv_blocks=config.cache.num_kv_blocks,
                kv_cache_memory=config.cache.kv_cache_memory,
            )
        except Exception as error:  # noqa: BLE001 - raised again where the start is waited for
            self.fail(0, str(error), error)
            return
        feeds = config.scheduler.schedule_ahead and self._num_stages > 1
        for stage in self.stages:
            is_last = stage.index == self._num_stages - 1
            following = self._folder.address("results") if is_last else self.stages[stage.index + 1].address
            first = self.stages[0].address if is_last and feeds else None
            self._say(stage, Allocate(num_blocks, self._settings.block_size, following, first))
        self._num_blocks = num_blocks

    def _probe(self) -> None:
        socket = data_socket(self._context, zmq.PUSH)
        socket.connect(self.stages[0].address)
        self.sender = PlanSender(Outbound(socket, self._token), self.epoch, self._in_flight)
        self.sender.probe()

    def _serve(self) -> None:
        """The probe is back: every link stands, so nothing needs the socket files any more."""
        self._folder.remove()
        for stage in self.stages:
            self._say(stage, Serving())
        infos = [stage.info for stage in self.stages if stage.info is not None]
        settings = self._settings
        self.info = ExecutorInfo(
            sum_up(infos),
            self._num_blocks,
            settings.block_size,
            self._num_stages,
            feeds_back=settings.config.scheduler.schedule_ahead,
            layers_per_stage=tuple(info.num_layers for info in infos),
        )

    def _check(self, result: StepResult) -> None:
        """Raise ``WireError`` unless it answers the oldest plan in flight."""
        if not self._in_flight:
            raise PeerError(None, f"a result of step {result.step}, which nobody asked for")
        due = self._in_flight.popleft()
        if (result.epoch, result.step) != (self.epoch, due.step):
            raise WireError(f"a result of step {result.epoch}/{result.step} where {self.epoch}/{due.step} is due")
        if len(result.tokens) != (0 if result.error is not None else due.num_sampled):
            raise WireError(f"{len(result.tokens)} tokens for {due.num_sampled} rows")
        vocab_size = self.info.model.vocab_size if self.info is not None else 0
        if result.tokens and not 0 <= min(result.tokens) <= max(result.tokens) < vocab_size:
            raise WireError(f"tokens from {min(result.tokens)} to {max(result.tokens)} of a vocabulary of {vocab_size}")
        if len(result.busy) != self._num_stages:
            raise WireError(f"times of {len(result.busy)} stages, not {self._num_stages}")
