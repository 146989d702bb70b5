"""What a stage's process does when a signal tells it to fall ill; and how a test sees what is left of one."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_engine.core.step import StepResult
from llm_engine.workers.wire import Kind, encode_result
from tests.toy_model_engine import OnForward
from tests.toy_stages import ask_gate

MARK = "LLM_ENGINE_TEST_RUN"
"""A variable that every process started by a test inherits, and whatever these start."""

# -- in the stage's process


def sick(gate: str) -> OnForward:
    """Hook of a stage: every forward asks the gate, and signals make it ill."""
    signal.signal(signal.SIGUSR1, _send_garbage)
    signal.signal(signal.SIGUSR2, _break_down)
    return ask_gate(gate)


class _BreakDown(BaseException):
    """No step's failure: it ends the stage."""


def _break_down(*_: Any) -> None:
    raise _BreakDown("the stage was told to break down")


def _send_garbage(*_: Any) -> None:
    """What no peer should send, under the right token and number: as a bug or a broken memory would."""
    gc.unfreeze()  # what was there when the stage began to serve is in no list otherwise
    (runner,) = (thing for thing in gc.get_objects() if type(thing).__name__ == "StageRunner")
    if not runner._stage.is_last:
        runner._outbound.send(Kind.PLAN, *[b"\xc1\x00garbage"] * 4)
    elif os.environ["GARBAGE"] == "well-formed":
        runner._outbound.send(Kind.RESULT, encode_result(StepResult(0, 10**6, [1, 2, 3])))
    else:
        runner._outbound.send(Kind.RESULT, b"\xc1\x00garbage")


# -- in the test


def marked_processes(mark: str) -> list[int]:
    """Every process that carries the mark, wherever it was started and whoever its parent is now; zombies are none."""
    return [pid for pid in _pids() if pid != os.getpid() and mark in _environment(pid) and not _is_zombie(pid)]


def await_gone(mark: str, seconds: float = 2.0) -> None:
    await_that(lambda: not marked_processes(mark), seconds, lambda: marked_processes(mark))


def await_that(condition: Callable[[], bool], seconds: float, shown: Callable[[], object] = lambda: "") -> float:
    """How long it took to come true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, shown()
        time.sleep(0.002)
    return time.monotonic() - began


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _environment(pid: int) -> str:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((v.decode() for v in variables if v.startswith(MARK.encode() + b"=")), "")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
