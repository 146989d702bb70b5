"""What the engine knows of one stage process, and what follows from it about its health."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass

from ...core import errors
from ...workers.control import Failed, Heartbeat
from ...workers.model_engine import ModelInfo
from .zmq_process import StageProcess

SILENT_SECONDS = 1.5
"""A stopped process is found this long after its last heartbeat (they come every 0.5 s)."""
REMOTE_SILENT_SECONDS = 1.75
STARVED_SECONDS = 10.0
"""A process that is there and not stopped may be this silent: it waits for a core, or for its own interpreter lock."""
LOADING_SILENT_SECONDS = 60.0
"""While it starts: libraries may hold the interpreter lock for long as they load."""


@dataclass(slots=True)
class StageRecord:
    """One stage of one start. Owned by the output thread."""

    index: int
    process: StageProcess | None = None
    """``None`` for one that was started by hand, elsewhere."""
    identity: bytes | None = None
    """Of its control connection; ``None`` before it said hello."""
    heard_at: float = 0.0
    progress: tuple[int, int] | None = None
    info: ModelInfo | None = None
    address: str = ""
    memory: str = ""
    ready: bool = False
    executing: Heartbeat | None = None
    """Its last heartbeat."""

    def ailment(self, now: float, *, serving: bool, patience: float) -> str | None:
        """Why the stage is to be given up; ``None`` while there is hope.

        ``patience`` is how many seconds one step may take.
        """
        if self.identity is None:
            return None
        silent = now - self.heard_at
        if self.process is None:
            if silent > REMOTE_SILENT_SECONDS and (serving or silent > LOADING_SILENT_SECONDS):
                return f"nothing was heard of it for {silent:.1f} s"
        elif silent > SILENT_SECONDS:
            if self.process.is_stopped:
                return f"its process is stopped: nothing was heard of it for {silent:.1f} s"
            if silent > (STARVED_SECONDS if serving else LOADING_SILENT_SECONDS):
                return f"nothing was heard of its process for {silent:.1f} s"
        beat = self.executing
        if serving and beat is not None and beat.step is not None:
            seconds = beat.seconds + silent
            if seconds > patience:
                return f"it is stuck in step {beat.step} for {seconds:.1f} s"
        return None


def combined_progress(records: Sequence[StageRecord]) -> tuple[int, int] | None:
    """(bytes done, bytes in all) over the stages; those not heard of yet are taken to be like the others."""
    known = [record.progress for record in records if record.progress is not None]
    if not known:
        return None
    total = sum(total for _, total in known)
    return sum(done for done, _ in known), total * len(records) // len(known)


class StageTraceback(Exception):
    """The traceback of an exception in a stage's process."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0].rstrip()}\n"""'


def error_of(index: int, failed: Failed) -> BaseException:
    """The exception that a stage reported, of its own type where that is one of ours or Python's."""
    message = f"stage {index}: {failed.message}"
    kind = getattr(errors, failed.kind, None) or getattr(builtins, failed.kind, None)
    error: BaseException
    if kind is errors.ConfigError and len(failed.arguments) == 3:
        error = errors.ConfigError(*failed.arguments)
        error.args = (message,)
    elif isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(message)
        except TypeError:
            error = errors.EngineDeadError(message)
    else:
        error = errors.EngineDeadError(message)
    error.__cause__ = StageTraceback(failed.traceback)
    return error
