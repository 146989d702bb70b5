"""The stage processes of one epoch: brought up, watched, and taken down together.

Owned by the output thread. ``take_control``, ``take_result`` and ``look`` wait for nothing; they are called when there
is something to take, or from time to time. What does wait: ``end``, as long as it is told; the start of the processes;
and for a second at most whoever removes the socket files.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import zmq

from ...core.errors import EngineDeadError
from ...core.step import StepResult
from ...workers.control import (
    ClockPong,
    Failed,
    FromStage,
    Heartbeat,
    Hello,
    Launch,
    Loaded,
    Log,
    Progress,
    Ready,
)
from ...workers.links import Inbound, data_socket
from ...workers.ring import ring_ends
from ...workers.stage_sockets import bind_tcp
from ...workers.wire import TOKEN_BYTES, Kind, WireError
from .base import ExecutorInfo
from .zmq_addresses import ENGINE, Links, SocketFolder
from .zmq_bringup import Bringup, StageSettings
from .zmq_control import ControlSocket, Door
from .zmq_data import PlanSender, Results, on_engines_clock
from .zmq_process import StageProcess
from .zmq_stage import StageRecord, combined_progress, error_of
from .zmq_stages_first import stages_have_every_cpu

logger = logging.getLogger(__name__)

GRACE_SECONDS = 0.3
"""How long a process may take to end by itself before it is killed."""
LOST_SECONDS = 10.0
"""Nobody computes and a step is not back: it got lost between two stages."""
PROBE_SECONDS = 20.0
"""Links that have not come about by then never will: something between two hosts lets nothing through."""
_QUEUES_A_STAGE = 4
"""More than any scheduler here wants."""
_AWAY_SECONDS = 1.0
"""Longer between two looks, and the stages' silence is not theirs."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group is of no further use."""

    stage: int
    cause: str
    error: BaseException
    """For whoever waits for the start."""


class StageGroup:
    """One start of all stages, for one epoch. Raises ``ConfigError`` where it cannot even begin.

    ``door`` is where stages of other hosts come in; it outlives the group. ``load_patience`` is how many seconds the
    stages may take from the last one's hello until all serve.
    """

    def __init__(
        self,
        settings: StageSettings,
        context: zmq.Context[Any],
        epoch: int,
        door: Door | None,
        on_progress: Callable[[int, int], None] | None,
        load_patience: float = math.inf,
    ) -> None:
        self.epoch = epoch
        self.info: ExecutorInfo | None = None
        """Set once all stages serve."""
        self.load_seconds: float | None = None
        """What that took from the last one's hello."""
        self.failure: Failure | None = None
        self._settings = settings
        self._door = door
        self._on_progress = on_progress
        self._load_patience = load_patience
        self._kill_at: float | None = None
        self._looked_at = self._moved_at = self._joined_at = time.monotonic()
        self._by_identity: dict[bytes, StageRecord] = {}
        num_stages = settings.config.parallel.pipeline_parallel_size
        self._last = num_stages - 1
        token = secrets.token_bytes(TOKEN_BYTES)
        links = Links(num_stages, settings.remote, feeds_back=settings.config.scheduler.schedule_ahead)
        self.stages = [StageRecord(index, self._looked_at) for index in range(num_stages)]
        addresses: list[str] = []
        with ExitStack() as undo:
            self._folder = SocketFolder()
            undo.callback(self._folder.remove)
            self._local = ControlSocket(context, token)
            undo.callback(self._local.close)
            results = data_socket(context, zmq.PULL)
            undo.pop_all()
        inbound = Inbound(results, token, dict.fromkeys((Kind.RESULT, Kind.PROBE), self._last))
        self._bringup = Bringup(settings, context, epoch, token, self.stages, links, self._folder, addresses)
        self._results = Results(inbound, epoch, num_stages, self._bringup.in_flight)
        try:
            self._local.socket.bind(self._folder.address("control"))
            addresses += self._bind_results(links)
            scheduler = settings.config.scheduler
            num_queues = scheduler.num_queues or _QUEUES_A_STAGE * num_stages
            ring = ring_ends(scheduler.max_num_seqs, num_queues) if links.ring_is_local else nullcontext()
            with ring as ends:
                inherited = {} if ends is None else dict(zip((0, self._last), ends, strict=True))
                for stage in self.stages:
                    if stage.index not in settings.remote:
                        stage.process = StageProcess(self._launch(stage.index, token, inherited.get(stage.index)))
        except BaseException:
            self.begin_end()
            self.end(GRACE_SECONDS + 1.0)
            raise

    @property
    def sender(self) -> PlanSender | None:
        return self._bringup.sender

    @property
    def results(self) -> zmq.Socket[Any]:
        """Readable when there may be a result to take."""
        return self._results.socket

    @property
    def controls(self) -> list[zmq.Socket[Any]]:
        """Readable when a stage has said something."""
        return (
            [self._local.socket]
            if self._door is None
            else [self._local.socket, self._door.socket, self._door.handshakes]
        )

    def pidfds(self) -> list[int]:
        """Turn readable when a process ends."""
        return [s.process.pidfd for s in self.stages if s.process is not None and s.process.pidfd is not None]

    @property
    def awaited(self) -> list[int]:
        """Stages that have not joined yet and are started by hand."""
        return [stage.index for stage in self.stages if stage.process is None and stage.identity is None]

    # -- what arrives

    def take_control(self) -> None:
        """Read every control message that is there, until one ends this group: others may be for the next one."""
        if self._door is not None:
            self._door.look()
        if self.failure is not None:
            return
        for control in (self._local, self._door) if self._door is not None else (self._local,):
            for identity, message in control.receive():
                self._take(control, identity, message)
                if self.failure is not None:
                    return

    def take_result(self) -> StepResult | None:
        """The next result that has arrived; ``None`` where there is none."""
        if self.failure is not None:
            return None
        try:
            result = self._results.take()
        except WireError as error:
            self.fail(self._last, f"stage {self._last} sent nonsense: {error}")
            return None
        if result is None:
            return None
        self._moved_at = time.monotonic()
        if isinstance(result, StepResult):
            if self._settings.remote:
                offsets = [0.0 if stage.clock is None else stage.clock.seconds for stage in self.stages]
                result = on_engines_clock(result, offsets)
            return result
        if self.info is not None:
            self.fail(self._last, f"stage {self._last} sent nonsense: a probe that nobody sent")
            return None
        self.info = self._bringup.serve()
        self.load_seconds = self._moved_at - self._joined_at
        self._results.vocab_size = self.info.model.vocab_size
        return None

    def look(self, now: float, patience: float) -> None:
        """See whether every process lives and is well, by what they have said so far."""
        self.take_control()
        away, self._looked_at = now - self._looked_at, now
        if away > _AWAY_SECONDS:  # nobody could have been heard: this process was held up itself
            self._moved_at = min(self._moved_at + away, now)
            self._joined_at = min(self._joined_at + away, now)
            for stage in self.stages:
                stage.heard_at = min(stage.heard_at + away, now)
        for stage in self.stages:
            if self.failure is None:
                ended = stage.process.poll() if stage.process is not None else None
                ailment = ended or stage.ailment(now, serving=self.info is not None, patience=patience)
                if ended is not None and stage.identity is None:
                    ailment = f"{ended}, before it joined"
                if ailment is not None and stage.process is not None and stage.process.first_words:
                    ailment += f":\n{stage.process.first_words}"
                if ailment is not None:
                    self.fail(stage.index, ailment)
        self._look_for_lost_steps(now)
        self._look_for_endless_loading(now)
        probed_at = self._bringup.probed_at
        if self.info is None and probed_at is not None and now - probed_at > PROBE_SECONDS:
            where = ", ".join(address for stage in self.stages for address in stage.addresses)
            self.fail(
                self._last,
                f"all stages are ready, but nothing came round their links within {now - probed_at:.0f} s; "
                f"can each be reached by the one before it, and the engine by the last? ({where})",
            )

    def fail(self, stage: int, cause: str, error: BaseException | None = None) -> None:
        """The first failure counts; the stages' books are void from then on."""
        if self.failure is None:
            self.failure = Failure(stage, cause, error or EngineDeadError(f"stage {stage} died: {cause}"))
            self.begin_end()

    # -- the end

    def begin_end(self, *, final: bool = False) -> None:
        """Ask every stage to end, and drop what is under way. Callable twice.

        ``final`` where none will be started again; one that is asked before that is known comes back to the door.
        """
        if self._kill_at is not None:
            return
        self._kill_at = time.monotonic() + GRACE_SECONDS
        self._results.close()
        if self.sender is not None:
            self.sender.close()
        reason = f"stage {self.failure.stage} died: {self.failure.cause}" if self.failure is not None else ""
        for stage in self.stages:
            if stage.process is not None:
                stage.process.ask_to_end()
            elif stage.identity is not None and self._door is not None:
                self._door.dismiss(stage.identity, final=final, reason=reason or "the engine has ended")
                if final:
                    self._door.guests.discard(stage.index)
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
        self._local.close()
        self._folder.remove()
        return True

    # -- its own

    def _bind_results(self, links: Links) -> list[str]:
        socket, addresses = self._results.socket, [self._folder.address("results")]
        socket.bind(addresses[0])
        if links.binds_tcp(ENGINE):
            assert self._door is not None and self._settings.key is not None, "remote stages need a door and a key"
            self._settings.key.secure(socket, server=True)
            addresses.append(bind_tcp(socket, self._door.host))
        return addresses

    def _launch(self, index: int, token: bytes, ring: int | None) -> Launch:
        settings = self._settings
        placement = settings.placements[index]
        return Launch(
            control=self._folder.address("control"),
            token=token.hex(),
            index=index,
            parent_pid=os.getpid(),
            key=None if settings.key is None else (settings.key.public, settings.key.secret),
            host=None if self._door is None else self._door.host,
            cpus=None if placement.cpus is None else sorted(placement.cpus),
            num_threads=placement.num_threads,
            ring=ring,
            # Without a ring the first stage's tokens leave by that thread, too.
            patient_io=ring is not None and index == self._last and stages_have_every_cpu(settings),
            log_level=logging.getLogger("llm_engine").getEffectiveLevel(),
        )

    def _take(self, control: ControlSocket, identity: bytes, message: FromStage | WireError) -> None:
        stage = self._by_identity.get(identity)
        if stage is None:
            if isinstance(message, Hello):
                self._greet(control, identity, message)
            else:
                control.drop("it comes from no stage of this start")
            return
        stage.heard_at = time.monotonic()
        try:
            self._take_from(stage, message)
        except Exception as error:  # noqa: BLE001 - it fails the stages, not the thread
            self.fail(stage.index, f"stage {stage.index}: {error}", error)

    def _greet(self, control: ControlSocket, identity: bytes, hello: Hello) -> None:
        stage = self._bringup.greet(control, identity, hello)
        if stage is None:
            return
        self._by_identity[identity] = stage
        stage.heard_at = self._joined_at = time.monotonic()
        if stage.process is None and self._door is not None:
            self._door.guests.add(stage.index)

    def _take_from(self, stage: StageRecord, message: FromStage | WireError) -> None:
        if isinstance(message, Heartbeat):
            stage.beat = message
            stage.ask_time(stage.heard_at)
        elif isinstance(message, ClockPong) and stage.clock is not None:
            stage.clock.observe(message, stage.heard_at)
            if not self._bringup.clock_is_known(stage):
                stage.ask_time(time.monotonic())
        elif isinstance(message, Progress):
            stage.progress = (message.done, message.total)
            progress = combined_progress(self.stages)
            if self._on_progress is not None and progress is not None:
                self._on_progress(*progress)
        elif isinstance(message, Log):
            logging.getLogger(message.logger).log(message.level, "stage %d: %s", stage.index, message.text)
        elif isinstance(message, Failed):
            self._take_failure(stage.index, message)
        elif isinstance(message, Hello) and stage.info is None:
            pass  # one for each connection it had before it was answered: the earlier ones were still to be sent
        elif isinstance(message, Loaded):
            self._bringup.take_loaded(stage, message)
        elif isinstance(message, Ready):
            self._bringup.take_ready(stage)
        else:
            self.fail(stage.index, f"stage {stage.index} sent nonsense: {message}")

    def _take_failure(self, index: int, failed: Failed) -> None:
        if self._door is not None and not self.stages[index].ready:
            self._door.guests.discard(index)  # it cannot run at all: whoever started it has to see to that
        if failed.blames is not None:
            blamed = "the engine" if failed.blames < 0 else f"stage {failed.blames}"
            self.fail(max(failed.blames, 0), f"{blamed} sent nonsense to stage {index}: {failed.message}")
        else:
            self.fail(index, f"{failed.message}\n{failed.traceback}".rstrip(), error_of(index, failed))

    def _look_for_lost_steps(self, now: float) -> None:
        in_flight = self._bringup.in_flight
        if self.failure is not None or not in_flight:
            return
        step, since = in_flight[0].step, max(self._moved_at, in_flight[0].sent_at)
        idle = all(stage.beat is not None and stage.beat.step is None for stage in self.stages)
        if idle and now - since > LOST_SECONDS:
            self.fail(self._last, f"step {step} got lost between the stages {now - since:.0f} s ago")

    def _look_for_endless_loading(self, now: float) -> None:
        if self.failure is not None or self.info is not None or any(stage.identity is None for stage in self.stages):
            return
        if now - self._joined_at > self._load_patience:
            awaited = [stage.index for stage in self.stages if stage.info is None] or [
                stage.index for stage in self.stages if not stage.ready
            ]
            cause = f"its start took over {self._load_patience:.0f} s, far longer than the first one"
            self.fail(awaited[0] if awaited else self._last, cause)
