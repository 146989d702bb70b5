"""The toy model for stage processes, which can be told no objects: what it is to do stands in the environment.

A test calls ``tell_stages`` and gives the engine ``make_stage``; each stage's process reads what was told. Loads no
torch, and says so when it finds it loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_engine.workers.batch import StageBatch
from llm_engine.workers.stage_model import imported
from tests.toy_model_engine import OnForward, ToyModelEngine, fail_on

_VARIABLE = "TOY_STAGES"


def tell_stages(
    monkeypatch: pytest.MonkeyPatch,
    num_stages: int,
    hooks: dict[int, Any] | None = None,
    engine_class: type[ToyModelEngine] = ToyModelEngine,
    **settings: Any,
) -> None:
    """For the stages started from now on. ``hooks`` maps a stage (negative from the end) to a ``ProcessGate``, or to
    (name of a function of ours, its arguments) that makes its ``on_forward``."""
    told = {
        "num_stages": num_stages,
        "engine": f"{engine_class.__module__}:{engine_class.__qualname__}",
        "settings": settings,
        "hooks": {
            stage % num_stages: hook.told if isinstance(hook, ProcessGate) else hook
            for stage, hook in (hooks or {}).items()
        },
    }
    monkeypatch.setenv(_VARIABLE, json.dumps(told))


def make_stage(stage: int) -> ToyModelEngine:
    """Called in the stage's process."""
    assert "torch" not in sys.modules, "a toy needs no torch"
    told = json.loads(os.environ[_VARIABLE])
    on_forward: OnForward | None = None
    if str(stage) in told["hooks"]:
        name, *arguments = told["hooks"][str(stage)]
        on_forward = imported(f"{__name__}:{name}" if ":" not in name else name)(*arguments)
    return imported(told["engine"])(stage, told["num_stages"], on_forward=on_forward, **told["settings"])


def failing(*numbers: int) -> OnForward:
    return fail_on(*numbers)


def complaining() -> OnForward:
    """Logs a warning at its first forward."""

    def hook(number: int, batch: StageBatch) -> None:
        if number == 0:
            logging.getLogger("toy").warning("it is hot in here")

    return hook


class ProcessGate:
    """What ``Gate`` is, for a stage in another process: holds every forward until let through.

    The stage's end connects to a socket of the test's and asks it before every forward. ``waiting`` and
    ``let_through`` are as with ``Gate``.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / f"gate-{id(self)}")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._tickets = threading.Semaphore(0)
        self._open = False
        self.waiting = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._serve, name="gate", daemon=True)
        self._thread.start()

    @property
    def told(self) -> tuple[str, str]:
        return ("ask_gate", self._path)

    def let_through(self, count: int = 1) -> None:
        self._tickets.release(count)

    def open(self) -> None:
        """Hold nothing from now on."""
        self._open = True
        self._tickets.release()

    def close(self) -> None:
        """Any number of times."""
        self.open()
        self._listener.close()

    def _serve(self) -> None:
        """One stage after the other, as they are started anew."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):  # a stage that was killed while it was held
                while connection.recv(1):
                    self.waiting.release()
                    if not self._open:
                        self._tickets.acquire()
                    connection.sendall(b"!")


def ask_gate(path: str) -> OnForward:
    """The stage's end of a ``ProcessGate``."""
    connection: list[socket.socket] = []

    def hook(number: int, batch: StageBatch) -> None:
        if not connection:
            connection.append(socket.socket(socket.AF_UNIX))
            connection[0].connect(path)
        connection[0].sendall(b"?")
        assert connection[0].recv(1) == b"!"

    return hook


MakeHook = Callable[..., OnForward]
