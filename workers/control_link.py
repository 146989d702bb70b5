"""A stage's side thread: it alone speaks to the engine beside the steps, and it ends the process when it must.

It runs whatever the main thread is doing, as long as that lets go of the interpreter lock now and then: so the engine
can tell a stage that computes long from one that is gone. It reads the end of standard input, which is the engine's
end, and makes sure that the process never outlives the engine.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import socket as sockets
import sys
import threading
import time
import traceback
from queue import Empty, SimpleQueue
from typing import Any

import zmq

from ..core.errors import ConfigError
from ..core.version import __version__
from .control import (
    HEARTBEAT_SECONDS,
    Allocate,
    ClockPing,
    ClockPong,
    Failed,
    Heartbeat,
    Hello,
    Launch,
    Log,
    Message,
    Refused,
    Serving,
    Setup,
    Stop,
    ToStage,
    decode_to_stage,
    encode,
)
from .links import PeerError, data_socket
from .wire import WIRE_VERSION, WireError

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How long the main thread may take to come to an end once it is told to."""
_PR_SET_PDEATHSIG = 1


class StoppedError(Exception):
    """The engine wants this stage no longer."""


class ControlLink(threading.Thread):
    """Any thread may ``send``; the main thread waits with ``expect`` and reads ``stop_fd``, which turns readable for
    good when the stage is to end. ``executing`` is written by the main thread: the step it is in, and since when."""

    def __init__(self, launch: Launch, context: zmq.Context[Any]) -> None:
        super().__init__(name="control", daemon=True)
        self.executing: tuple[int, float] | None = None
        self.stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._launch = launch
        self._token = bytes.fromhex(launch.token)
        self._context = context
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._outbox: SimpleQueue[Message] = SimpleQueue()
        self._inbox: SimpleQueue[ToStage | None] = SimpleQueue()
        self._deadline: float | None = None
        """When the process ends whatever the main thread does."""
        self._done = False
        self.final = False
        """Whether the engine said that it ends for good."""

    # -- the main thread

    def send(self, message: Message) -> None:
        self._outbox.put(message)
        os.eventfd_write(self._wake_fd, 1)

    def expect(self, kind: type[Setup] | type[Allocate]) -> Any:
        """The next message, which must be of this kind. Raises ``StoppedError`` when the stage is to end."""
        message = self._inbox.get()
        if isinstance(message, kind):
            return message
        if isinstance(message, Refused):
            raise StoppedError(f"the engine refused this stage: {message.reason}")
        if message is None:
            raise StoppedError("the engine wants this stage no longer")
        raise PeerError(-1, f"{type(message).__name__} where {kind.__name__} is due")

    def fail(self, error: BaseException) -> None:
        """Tell the engine what went wrong and wait until it has taken note."""
        self.send(failure_of(error))
        self._inbox_until_stopped()

    def close(self) -> None:
        """Send what is left and end the thread."""
        self._done = True
        os.eventfd_write(self._wake_fd, 1)
        self.join(GRACE_SECONDS)

    def _inbox_until_stopped(self) -> None:
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                if self._inbox.get(timeout=left) is None:
                    return
            except Empty:
                return

    # -- its own

    def run(self) -> None:
        try:
            self._run()
        except BaseException:  # noqa: BLE001 - the stage cannot go on without it
            traceback.print_exc()
            self._end_process(1)

    def _run(self) -> None:
        socket = data_socket(self._context, zmq.DEALER)
        socket.connect(self._launch.control)
        self._post(socket, Hello(WIRE_VERSION, __version__, self._launch.index, os.getpid(), sockets.gethostname()))
        poller = zmq.Poller()
        for fd in (socket, self._wake_fd, sys.stdin.fileno()):
            poller.register(fd, zmq.POLLIN)
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            deadline = min(next_beat, self._deadline or next_beat)
            ready = dict(poller.poll(int(max(deadline - time.monotonic(), 0.0) * 1000) + 1))
            if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
                poller.unregister(sys.stdin.fileno())
                self._on_parents_end()
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            while not self._outbox.empty():
                self._post(socket, self._outbox.get())
            if self._done:
                socket.close(int(GRACE_SECONDS * 1000))
                return
            if socket in ready:
                self._take(socket)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + HEARTBEAT_SECONDS
                executing = self.executing
                step, since = executing if executing is not None else (None, now)
                self._post(socket, Heartbeat(step, now - since))
            if self._deadline is not None and now >= self._deadline:
                self._end_process(1)

    def _post(self, socket: zmq.Socket[Any], message: Message) -> None:
        socket.send_multipart([self._token, encode(message)], zmq.NOBLOCK)

    def _take(self, socket: zmq.Socket[Any]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_to_stage(frames[-1])
            except WireError as error:
                logger.error("the engine sent nonsense: %s", error)
                continue
            if isinstance(message, ClockPing):
                self._post(socket, ClockPong(message.sent_at, time.monotonic()))
            elif isinstance(message, Serving):
                # From here on nothing lies about that would have to be cleared away.
                ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != self._launch.parent_pid:
                    self._end_process(1)
            elif isinstance(message, Stop):
                self.final = message.final
                self._stop()
            else:
                self._inbox.put(message)

    def _on_parents_end(self) -> None:
        """Standard input has ended: the parent lets go of this stage, or is dead."""
        if os.getppid() != self._launch.parent_pid:
            self._end_process(1)
        self._stop()

    def _stop(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + GRACE_SECONDS
            self._inbox.put(None)
            os.eventfd_write(self.stop_fd, 1)

    def _end_process(self, code: int) -> None:
        if self._launch.directory is not None and os.getppid() != self._launch.parent_pid:
            shutil.rmtree(self._launch.directory, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with a compiler that may be running
        os._exit(code)


class LogToEngine(logging.Handler):
    """Sends records to the engine's log."""

    def __init__(self, link: ControlLink) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._link.send(Log(record.levelno, record.name, self.format(record)))
        except Exception:  # noqa: BLE001 - a record must never break what it tells of
            self.handleError(record)


def failure_of(error: BaseException) -> Failed:
    """What the engine is told of an exception."""
    arguments: list[Any] = []
    if isinstance(error, ConfigError):
        plain = isinstance(error.value, int | float | str | None)
        arguments = [error.field, error.value if plain else repr(error.value), error.allowed]
    return Failed(
        kind=type(error).__name__,
        message=str(error) or type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
        arguments=arguments,
        blames=error.sender if isinstance(error, PeerError) else None,
    )
