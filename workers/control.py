"""What an engine and its stages say to each other beside the steps: the control messages. Loads no torch.

A stage connects a DEALER to the engine's ROUTER; every message of the stage carries its token in a frame of its own.

::

    stage                                    engine
      Hello  ->                             (over each connection until it is answered) who I am, what I speak
                                        <-  Setup            what you are; or Refused
      Progress ..., Loaded  ->                               weights are in; where my inbound socket is
                                        <-  Allocate         the pool, and who comes after you
      Ready  ->                             (when all are: a probe goes round the data sockets)
      Heartbeat, every half second  ->      (from the engine's first word on)
      Failed  ->                        <-  Stop             at any time
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..core.config import EngineConfig
from .model_engine import ModelInfo
from .wire import MAX_FRAME, Buffer, Seconds, WireError, packed

HEARTBEAT_SECONDS = 0.5
FIRST_WORDS = "llm-engine-first-words"
"""Name of the file in memory that takes a stage's standard error until it joins."""


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The base of all control messages."""


class Hello(Message):
    wire_version: int
    package_version: str
    index: int
    pid: int
    host: str


class Setup(Message):
    """Everything a stage is made from."""

    index: int
    num_stages: int
    epoch: int
    token: bytes
    """For the data sockets."""
    config: EngineConfig
    block_size: int
    on_cuda: bool
    model_path: str | None
    model_engine: str | None
    """``module:qualname`` of what makes the stage's model engine; torch's when absent."""
    sampler: str
    fingerprint: str | None
    """Of the checkpoint the engine has."""
    inbound: str | None
    """Where the stage is to bind its inbound socket, for peers on the engine's host."""
    binds_tcp: bool
    """Whether it is to bind it for other hosts, too."""


class Refused(Message):
    reason: str
    final: bool = True
    """Whether asking again is of no use."""


class Progress(Message):
    done: int
    total: int


class Loaded(Message):
    info: ModelInfo
    addresses: list[str]
    """Where its inbound socket is bound: one, or one for this host and one for others."""
    memory: str
    """Names the memory its pool will lie in; stages that name the same share it."""


class Allocate(Message):
    num_blocks: int
    block_size: int
    next_address: str
    """Where its output goes."""
    first_address: str | None
    """Where the last stage feeds sampled tokens to; ``None`` for every other stage, and where nothing is fed or both
    have a ``Launch.ring``."""


class Ready(Message):
    pass


class Heartbeat(Message):
    step: int | None
    """What it executes."""
    seconds: Seconds
    """For how long already."""


class Failed(Message):
    """The stage cannot go on."""

    kind: str
    """The exception's type."""
    message: str
    traceback: str
    arguments: list[Any] = msgspec.field(default_factory=list)
    """What a ``ConfigError`` is made from."""
    blames: int | None = None
    """The stage whose message was nonsense, where that is the reason; the engine is -1."""


class Log(Message):
    """A log record of the stage, for the engine's log."""

    level: int
    logger: str
    text: str


class Stop(Message):
    final: bool
    """Whether the engine ends too, and not only this run of its stages."""
    reason: str = ""


class ClockPing(Message):
    sent_at: float
    """On the engine's clock."""


class ClockPong(Message):
    sent_at: Seconds
    answered_at: Seconds
    """On the stage's clock."""


FromStage = Hello | Progress | Loaded | Ready | Heartbeat | Failed | Log | ClockPong
ToStage = Setup | Refused | Allocate | Stop | ClockPing

_from_stage = msgspec.msgpack.Decoder(FromStage)
_to_stage = msgspec.msgpack.Decoder(ToStage)


def encode(message: Message) -> bytes:
    return packed(message)


def decode_from_stage(frame: Buffer) -> FromStage:
    """Raises ``WireError``."""
    return _decode(_from_stage, frame)


def decode_to_stage(frame: Buffer) -> ToStage:
    """Raises ``WireError``."""
    return _decode(_to_stage, frame)


def _decode(decoder: Any, frame: Buffer) -> Any:
    if len(frame) > MAX_FRAME:
        raise WireError(f"a control message of {len(frame)} bytes")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise WireError(f"a control message: {error}") from error


class Launch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The line on its standard input that tells a stage's process whom to join; JSON, so that no secret is in argv."""

    control: str
    token: str
    """Hexadecimal."""
    index: int
    parent_pid: int
    remote: bool = False
    """Whether it was started by hand: then it makes sure by itself that the engine is still there."""
    key: tuple[str, str] | None = None
    """CURVE key pair, public and secret, for tcp."""
    host: str | None = None
    """Of this host as others reach it, for tcp; found out by itself when absent."""
    model: str | None = None
    """Folder of the checkpoint, where it is not the engine's."""
    cpus: list[int] | None = None
    num_threads: int | None = None
    ring: int | None = None
    """Descriptor of its end of the ring, which it inherits; the first and the last stage may have one."""
    patient_io: bool = False
    """Whether its thread for sockets interrupts nobody when it wakes."""
    log_level: int = 30
