"""What the engine knows of one stage process, and what follows from it about its health."""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...core import errors
from ...workers.control import ClockPing, ClockPong, Failed, Heartbeat, Message
from ...workers.model_engine import ModelInfo
from .zmq_control import ControlSocket
from .zmq_process import StageProcess

SILENT_SECONDS = 1.5
"""A stopped process is found this long after its last heartbeat (they come every 0.5 s)."""
REMOTE_SILENT_SECONDS = 1.75
STARVED_SECONDS = 10.0
"""A process that is there and not stopped may be this silent: it waits for a core, or for its own interpreter lock."""
LOADING_SILENT_SECONDS = 60.0
"""While it starts: libraries may hold the interpreter lock for long as they load."""
JOIN_SECONDS = 600.0
"""How long a stage that is started by hand is waited for."""
_CLOCK_SAMPLES = 16


class ClockOffset:
    """How far a stage's clock is ahead of the engine's: halfway through the quickest of the last round trips."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=_CLOCK_SAMPLES)
        """(seconds of the round trip, offset)"""

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @property
    def seconds(self) -> float:
        """Wrong by half of the quickest round trip at most."""
        return min(self._samples)[1] if self._samples else 0.0

    def observe(self, pong: ClockPong, now: float) -> None:
        """A round trip ended at ``now`` on the engine's clock."""
        self._samples.append((now - pong.sent_at, pong.answered_at - (pong.sent_at + now) / 2))


@dataclass(slots=True)
class StageRecord:
    """One stage of one start. Owned by the output thread."""

    index: int
    heard_at: float
    """Since when its silence counts: it was heard of or started then, or the engine listened again only then."""
    process: StageProcess | None = None
    """``None`` for one that was started by hand, elsewhere."""
    control: ControlSocket | None = None
    identity: bytes | None = None
    """Of its control connection; ``None`` before it said hello."""
    progress: tuple[int, int] | None = None
    info: ModelInfo | None = None
    addresses: list[str] = field(default_factory=list)
    memory: str = ""
    ready: bool = False
    beat: Heartbeat | None = None
    """Its last heartbeat."""
    clock: ClockOffset | None = None
    """``None`` for a process of this host: its clock is the engine's."""

    def say(self, message: Message) -> None:
        assert self.control is not None and self.identity is not None, "it said hello"
        self.control.send(self.identity, message)

    def ask_time(self, now: float) -> None:
        """Begin a round trip, where its clock is another one. That also tells it that the engine is there."""
        if self.clock is not None:
            self.say(ClockPing(now))

    def ailment(self, now: float, *, serving: bool, patience: float) -> str | None:
        """Why the stage is to be given up; ``None`` while there is hope.

        ``patience`` is how many seconds one step may take.
        """
        silent = now - self.heard_at
        if self.process is not None and silent > SILENT_SECONDS and self.process.is_stopped:
            return f"its process is stopped: nothing was heard of it for {silent:.1f} s"
        if self.identity is None:
            if silent > (LOADING_SILENT_SECONDS if self.process is not None else JOIN_SECONDS):
                return f"it did not join within {silent:.0f} s"
        elif self.process is None:
            if silent > (REMOTE_SILENT_SECONDS if serving else LOADING_SILENT_SECONDS):
                return f"nothing was heard of it for {silent:.1f} s"
        elif silent > (STARVED_SECONDS if serving else LOADING_SILENT_SECONDS):
            return f"nothing was heard of its process for {silent:.1f} s"
        if serving and self.beat is not None and self.beat.step is not None:
            seconds = self.beat.seconds + silent
            if seconds > patience:
                return f"it is stuck in step {self.beat.step} for {seconds:.1f} s"
        return None


def combined_progress(records: Sequence[StageRecord]) -> tuple[int, int] | None:
    """(bytes done, bytes in all) over the stages; those not heard of yet are taken to be like the others."""
    known = [record.progress for record in records if record.progress is not None]
    if not known:
        return None
    total = sum(total for _, total in known)
    return sum(done for done, _ in known), total * len(records) // len(known)


class StageTraceback(Exception):
    """The traceback of an exception in a stage's process: the cause of the one raised here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0].rstrip()}\n"""'


def error_of(index: int, failed: Failed) -> BaseException:
    """The exception that a stage reported, of its own type where that is one of ours or Python's."""
    message = f"stage {index}: {failed.message}"
    kind = getattr(errors, failed.kind, None) or getattr(builtins, failed.kind, None)
    error: BaseException = errors.EngineDeadError(message)
    if kind is errors.ConfigError and len(failed.arguments) == 3:
        error = errors.ConfigError(*failed.arguments)
        error.args = (message,)
    elif isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(message)
        except TypeError:  # it is made from more than a message
            error = errors.EngineDeadError(message)
    error.__cause__ = StageTraceback(failed.traceback)
    return error
