"""How the stages of one epoch come up: from the first hello to the probe that has passed every link."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from ...core.config import EngineConfig
from ...core.version import __version__
from ...workers.control import Allocate, Hello, Loaded, Refused, Setup
from ...workers.links import Outbound
from ...workers.pipeline_key import PipelineKey
from ...workers.placement import StagePlacement
from ...workers.stage_sockets import connected
from ...workers.wire import WIRE_VERSION, WireError
from .base import ExecutorInfo
from .pool import choose_num_blocks, sum_up
from .zmq_addresses import ENGINE, Links, SocketFolder
from .zmq_control import ControlSocket
from .zmq_data import InFlight, PlanSender
from .zmq_stage import ClockOffset, StageRecord

logger = logging.getLogger(__name__)

_CLOCK_ROUND_TRIPS = 8
"""So many in a row tell a clock well before the first step; from then on there is one with each heartbeat."""


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What all stages of an executor are made from."""

    config: EngineConfig
    block_size: int
    on_cuda: bool
    model_path: str | None
    model_engine: str | None
    """``module:qualname`` of what makes a stage's model engine, in place of the checkpoint."""
    sampler: str
    """``module:qualname``."""
    placements: Mapping[int, StagePlacement]
    """Of the stages on this host."""
    remote: frozenset[int] = frozenset()
    """Stages that are started by hand, elsewhere."""
    key: PipelineKey | None = None
    fingerprint: str | None = None


class Bringup:
    """Answers what the stages say while they start. Owned by the output thread.

    ``results`` are the addresses at which the engine takes results. What it raises fails the start.
    """

    def __init__(
        self,
        settings: StageSettings,
        context: zmq.Context[Any],
        epoch: int,
        token: bytes,
        stages: Sequence[StageRecord],
        links: Links,
        folder: SocketFolder,
        results: Sequence[str],
    ) -> None:
        self.in_flight: deque[InFlight] = deque()
        self.sender: PlanSender | None = None
        """Set once the first stage can be sent to."""
        self.probed_at: float | None = None
        """When the probe was sent."""
        self._settings = settings
        self._context = context
        self._epoch = epoch
        self._token = token
        self._stages = stages
        self._links = links
        self._folder = folder
        self._results = results
        self._num_blocks = 0

    def greet(self, control: ControlSocket, identity: bytes, hello: Hello) -> StageRecord | None:
        """Take a stage in, or refuse it."""
        problem = self._problem(control, hello)
        if problem is not None:
            logger.error("a stage on %s (process %d) was refused: %s", hello.host, hello.pid, problem.reason)
            control.send(identity, problem)
            return None
        stage = self._stages[hello.index]
        stage.control, stage.identity = control, identity
        settings, is_local = self._settings, stage.process is not None
        stage.clock = None if is_local else ClockOffset()
        stage.say(
            Setup(
                index=stage.index,
                num_stages=len(self._stages),
                epoch=self._epoch,
                token=self._token,
                config=settings.config,
                block_size=settings.block_size,
                on_cuda=settings.on_cuda,
                model_path=settings.model_path,
                model_engine=settings.model_engine,
                sampler=settings.sampler,
                fingerprint=settings.fingerprint,
                inbound=self._folder.address(f"in-{stage.index}") if is_local else None,
                binds_tcp=self._links.binds_tcp(stage.index),
            )
        )
        stage.ask_time(time.monotonic())
        return stage

    def clock_is_known(self, stage: StageRecord) -> bool:
        return stage.clock is None or stage.clock.num_samples >= _CLOCK_ROUND_TRIPS

    def take_loaded(self, stage: StageRecord, loaded: Loaded) -> None:
        """Once all are loaded, tell them how large the pool is and who follows whom."""
        if stage.info is not None:
            raise WireError("it has loaded already")
        stage.info, stage.addresses, stage.memory = loaded.info, loaded.addresses, loaded.memory
        infos = [stage.info for stage in self._stages if stage.info is not None]
        if len(infos) < len(self._stages):
            return
        config = self._settings.config
        self._num_blocks = choose_num_blocks(
            infos,
            [stage.memory for stage in self._stages],
            block_size=self._settings.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            num_kv_blocks=config.cache.num_kv_blocks,
            kv_cache_memory=config.cache.kv_cache_memory,
        )
        for stage in self._stages:
            is_last = stage.index == self._links.last
            following = ENGINE if is_last else stage.index + 1
            has_ring = stage.process is not None and stage.process.has_ring
            feeds_far = is_last and self._links.feeds_back and not has_ring
            first = self._address(stage.index, 0) if feeds_far else None
            stage.say(
                Allocate(self._num_blocks, self._settings.block_size, self._address(stage.index, following), first)
            )

    def take_ready(self, stage: StageRecord) -> None:
        """Once all are ready, try every link."""
        if stage.ready or not self._num_blocks:
            raise WireError("it is ready too early, or once more")
        stage.ready = True
        if all(stage.ready for stage in self._stages):
            socket = connected(self._context, self._address(ENGINE, 0), self._settings.key)
            self.sender = PlanSender(Outbound(socket, self._token), self._epoch, self.in_flight)
            self.sender.probe()
            self.probed_at = time.monotonic()

    def serve(self) -> ExecutorInfo:
        """The probe is back: every link stands, so nothing needs the socket files any more."""
        self._folder.remove()
        infos = [stage.info for stage in self._stages if stage.info is not None]
        return ExecutorInfo(
            sum_up(infos),
            self._num_blocks,
            self._settings.block_size,
            len(self._stages),
            feeds_back=self._settings.config.scheduler.schedule_ahead,
            layers_per_stage=tuple(info.num_layers for info in infos),
        )

    def _address(self, sender: int, receiver: int) -> str:
        addresses = self._results if receiver == ENGINE else self._stages[receiver].addresses
        return self._links.address(sender, receiver, addresses)

    def _problem(self, control: ControlSocket, hello: Hello) -> Refused | None:
        if (hello.wire_version, hello.package_version) != (WIRE_VERSION, __version__):
            return Refused(
                f"it speaks version {hello.wire_version} of llm-engine {hello.package_version}, "
                f"the engine version {WIRE_VERSION} of {__version__}"
            )
        if not 0 <= hello.index < len(self._stages):
            return Refused(f"there is no stage {hello.index}: the engine has {len(self._stages)}, from 0")
        by_hand = hello.index in self._settings.remote
        stage = self._stages[hello.index]
        # The tokens differ, so only a stage that was started by hand can have come through the door.
        if by_hand == (stage.process is not None) or by_hand != control.is_door:
            return Refused(f"stage {hello.index} is not among the engine's remote_stages")
        if stage.identity is not None:
            return Refused(f"stage {hello.index} is here already", final=False)
        return None
