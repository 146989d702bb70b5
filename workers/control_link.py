"""A stage's side thread: it alone speaks to the engine beside the steps, and it ends the process when it must.

It runs whatever the main thread is doing, as long as that lets go of the interpreter lock now and then: so the engine
can tell a stage that computes long from one that is gone. It reads the end of standard input, which is the end of
whoever started the process, and makes sure that the process never outlives that.
"""

from __future__ import annotations

import logging
import os
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
    Setup,
    Stop,
    decode_to_stage,
    encode,
)
from .handshakes import HandshakeMonitor
from .links import STOP_ADDRESS, Outbound, PeerError, data_socket
from .pipeline_key import PipelineKey
from .ring import Ring
from .wire import WIRE_VERSION, Kind, WireError

EXIT_DONE = 0
"""The engine ended, or wants this stage no longer."""
EXIT_FAILED = 1
"""The stage cannot run; it has said why."""
EXIT_LOST = 5
"""The engine lost this stage, or the stage the engine: joining again may help."""

GRACE_SECONDS = 1.0
"""How long the main thread may take to come to an end once it is told to."""
ENGINE_SILENT_SECONDS = 3.0
"""A remote engine speaks every half second; one that is silent for so long is gone."""
_MAX_HANDSHAKES = 3
_PING_SECONDS = 10.0
"""Between the pings of a connection to another host, which is made anew when three of them go unanswered."""


class StoppedError(Exception):
    """The stage is to end, with this exit code; the message says why where somebody should know."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ControlLink(threading.Thread):
    """Any thread may ``send``; the main thread waits with ``expect``. When the stage is to end, ``stopped`` says why,
    and the main thread is told where it waits: by ``expect``, by the ring's cut, or by a message among those of its
    peers. ``executing`` is written by the main thread: the step it is in, and since when."""

    def __init__(self, launch: Launch, context: zmq.Context[Any], ring: Ring | None = None) -> None:
        super().__init__(name="control", daemon=True)
        self.executing: tuple[int, float] | None = None
        self.stopped: StoppedError | None = None
        self._launch = launch
        self._context = context
        self._ring = ring
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._outbox: SimpleQueue[Message] = SimpleQueue()
        self._inbox: SimpleQueue[Setup | Allocate | StoppedError] = SimpleQueue()
        self._deadline: float | None = None
        """When the process ends whatever the main thread does."""
        self._done = False
        self._stopper: Outbound | None = None
        """Made once the stage has data sockets, or will have them before it looks up again."""
        self._heard_at: float | None = None
        """When the engine last spoke; ``None`` before it did."""
        self._failed_handshakes = 0

    # -- the main thread

    def send(self, message: Message) -> None:
        self._outbox.put(message)
        os.eventfd_write(self._wake_fd, 1)

    def expect(self, kind: type[Setup] | type[Allocate]) -> Any:
        """The next message, which must be of this kind. Raises ``StoppedError`` when the stage is to end."""
        message = self._inbox.get()
        if isinstance(message, StoppedError):
            raise message
        if not isinstance(message, kind):
            raise PeerError(-1, f"{type(message).__name__} where {kind.__name__} is due")
        return message

    def fail(self, error: BaseException) -> None:
        """Tell the engine what went wrong, and wait until it has taken note and says stop."""
        self.send(failure_of(error))
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                if isinstance(self._inbox.get(timeout=left), StoppedError):
                    return
            except Empty:
                return

    def close(self) -> None:
        """Send what is left and end the thread."""
        self._done = True
        os.eventfd_write(self._wake_fd, 1)
        self.join(GRACE_SECONDS)

    # -- its own

    def run(self) -> None:
        try:
            self._run()
        except BaseException:  # noqa: BLE001 - the stage cannot go on without it
            traceback.print_exc()
            self._end_process(EXIT_FAILED)

    def _run(self) -> None:
        launch = self._launch
        socket = data_socket(self._context, zmq.DEALER)
        if launch.key is not None and launch.control.startswith("tcp:"):
            PipelineKey(*launch.key).secure(socket, server=False)
            # A host that fell silent before it answered, or a way that is closed where nothing is said for long.
            socket.set(zmq.HEARTBEAT_IVL, int(_PING_SECONDS * 1000))
            socket.set(zmq.HEARTBEAT_TIMEOUT, int(3 * _PING_SECONDS * 1000))
        handshakes = HandshakeMonitor(socket)
        socket.connect(launch.control)
        poller = zmq.Poller()
        for source in (socket, handshakes.socket, self._wake_fd, sys.stdin.fileno()):
            poller.register(source, zmq.POLLIN)
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            deadline = min(next_beat, self._deadline or next_beat)
            ready = dict(poller.poll(int(max(deadline - time.monotonic(), 0.0) * 1000) + 1))
            if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
                poller.unregister(sys.stdin.fileno())
                if os.getppid() != launch.parent_pid:
                    self._end_process(EXIT_DONE)
                self._end_with(StoppedError(EXIT_DONE))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            while not self._outbox.empty():
                self._post(socket, self._outbox.get())
            if self._done:
                handshakes.close()
                socket.close(int(GRACE_SECONDS * 1000))
                return
            if handshakes.socket in ready:
                self._take_handshakes(socket, handshakes)
            if socket in ready:
                self._take(socket)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + HEARTBEAT_SECONDS
                self._beat(socket, now)
            if self._deadline is not None and now >= self._deadline:
                self._end_process(EXIT_DONE if self.stopped is None else self.stopped.exit_code)

    def _beat(self, socket: zmq.Socket[Any], now: float) -> None:
        if os.getppid() != self._launch.parent_pid:  # somebody it has forked may hold standard input open
            self._end_process(EXIT_DONE)
        if self._heard_at is None:
            return
        step, since = self.executing or (None, now)
        # The main thread may have begun a step since ``now`` was read.
        self._post(socket, Heartbeat(step, max(now - since, 0.0)))
        silent = now - self._heard_at
        if self._launch.remote and silent > ENGINE_SILENT_SECONDS:
            self._end_with(StoppedError(EXIT_LOST, f"nothing was heard of the engine for {silent:.1f} s"))

    def _post(self, socket: zmq.Socket[Any], message: Message) -> None:
        socket.send_multipart([bytes.fromhex(self._launch.token), encode(message)], zmq.NOBLOCK)

    def _take(self, socket: zmq.Socket[Any]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard_at = time.monotonic()
            try:
                message = decode_to_stage(frames[-1])
            except WireError as error:
                self._post(socket, failure_of(PeerError(-1, str(error))))  # else both would wait for the other
                continue
            if isinstance(message, ClockPing):
                self._post(socket, ClockPong(message.sent_at, time.monotonic()))
            elif isinstance(message, Stop):
                self._end_with(StoppedError(EXIT_DONE if message.final else EXIT_LOST, message.reason))
            elif isinstance(message, Refused):
                code = EXIT_FAILED if message.final else EXIT_LOST
                self._end_with(StoppedError(code, f"the engine refused this stage: {message.reason}"))
            else:
                if isinstance(message, Setup):
                    stopping = data_socket(self._context, zmq.PUSH)
                    stopping.connect(STOP_ADDRESS)
                    self._stopper = Outbound(stopping, message.token)
                self._inbox.put(message)

    def _take_handshakes(self, socket: zmq.Socket[Any], handshakes: HandshakeMonitor) -> None:
        for failed in handshakes.take():
            self._failed_handshakes = self._failed_handshakes + 1 if failed else 0
            # Another connection may lead to another engine; one that has answered needs no second hello.
            if not failed and self._heard_at is None and self.stopped is None:
                index, host = self._launch.index, sockets.gethostname()
                self._post(socket, Hello(WIRE_VERSION, __version__, index, os.getpid(), host))
        if self._failed_handshakes >= _MAX_HANDSHAKES or handshakes.is_refused:
            reason = f"the engine at {self._launch.control} does not accept this pipeline key: it has another one"
            self._end_with(StoppedError(EXIT_FAILED, reason))

    def _end_with(self, stopped: StoppedError) -> None:
        if self.stopped is None:
            self.stopped = stopped
            self._deadline = time.monotonic() + GRACE_SECONDS
            self._inbox.put(stopped)
            if self._stopper is not None:
                self._stopper.send(Kind.STOP, b"")
            if self._ring is not None:
                self._ring.cut()

    def _end_process(self, code: int) -> None:
        if os.getppid() != self._launch.parent_pid and os.getpgrp() == os.getpid():
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
