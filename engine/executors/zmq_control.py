"""The engine's end of the control connections."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import zmq

from ...core.errors import ConfigError
from ...workers.control import FromStage, Hello, Message, Stop, decode_from_stage, encode
from ...workers.handshakes import HandshakeMonitor
from ...workers.links import data_socket
from ...workers.pipeline_key import PipelineKey, ZapThread
from ...workers.wire import WireError

logger = logging.getLogger(__name__)

_WARN_FIRST = 5
"""Strangers that are logged; more of them are counted."""
_LINGER_MS = 500
"""How long the last word to a stage on another host may take."""


class ControlSocket:
    """A ROUTER that stages connect to. It takes messages that carry its token and drops all others.

    Owned by the output thread. A connection is known by its identity, which proves nothing: the token does.
    """

    is_door = False
    """Whether stages of other hosts come in here."""

    def __init__(self, context: zmq.Context[Any], token: bytes) -> None:
        self.socket = data_socket(context, zmq.ROUTER)
        self._token = token
        self._num_strangers = 0
        self._dismissed: set[bytes] = set()
        """Connections whose messages are of no interest any more."""

    def receive(self) -> Iterator[tuple[bytes, FromStage | WireError]]:
        """(identity, message) of what has arrived, or what is wrong with it."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or frames[1] != self._token:
                self.drop("it does not carry the token")
                continue
            if frames[0] in self._dismissed:
                continue
            try:
                yield frames[0], decode_from_stage(frames[2])
            except WireError as error:
                yield frames[0], error

    def send(self, identity: bytes, message: Message) -> None:
        """Queue a message; what is for a connection that is gone is dropped."""
        self.socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)

    def drop(self, why: str) -> None:
        """A message of a stranger came."""
        self._num_strangers += 1
        if self._num_strangers <= _WARN_FIRST:
            more = "; more of them are dropped in silence" if self._num_strangers == _WARN_FIRST else ""
            logger.warning("a control message from a stranger was dropped: %s%s", why, more)

    def close(self) -> None:
        self.socket.close(0)


class Door(ControlSocket):
    """Where stages of other hosts come in: one tcp address, CURVE, for the executor's whole life."""

    is_door = True

    def __init__(self, context: zmq.Context[Any], address: str, key: PipelineKey) -> None:
        """Raises ``ConfigError`` for an address that cannot be bound."""
        super().__init__(context, key.token)
        self.address = address
        self.guests: set[int] = set()
        """Stages that have joined and will come again when they are lost, since nobody has told them not to."""
        self._num_refused = 0
        self._zap = ZapThread(context, key)
        self._zap.start()
        self._handshakes = HandshakeMonitor(self.socket)
        try:
            self.socket.set(zmq.IPV6, 1)
            key.secure(self.socket, server=True)
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError("pipeline_address", address, f"a free address of this host ({error})") from error

    @property
    def host(self) -> str:
        """As other hosts reach it; brackets around it where it is IPv6."""
        host = urlsplit(self.address).hostname or ""
        return f"[{host}]" if ":" in host else host

    @property
    def handshakes(self) -> zmq.Socket[Any]:
        """Readable when ``look`` has something to see."""
        return self._handshakes.socket

    def look(self) -> None:
        """Log who was not let in."""
        for failed in self._handshakes.take():
            self._num_refused += failed
            if failed and self._num_refused <= _WARN_FIRST:
                logger.error("somebody was not let in at %s: not with this pipeline key", self.address)

    def dismiss(self, identity: bytes, *, final: bool, reason: str) -> None:
        """A stage is to end; what it still says is dropped."""
        self._dismissed.add(identity)
        self.send(identity, Stop(final, reason))

    def see_off(self, seconds: float) -> None:
        """Tell each guest that the engine has ended as it comes again; waits for them at most so long."""
        deadline = time.monotonic() + seconds
        while self.guests and self.socket.poll(math.ceil(max(deadline - time.monotonic(), 0.0) * 1000)):
            for identity, message in self.receive():
                if isinstance(message, Hello):
                    self.dismiss(identity, final=True, reason="the engine has ended")
                    self.guests.discard(message.index)

    def close(self) -> None:
        self._handshakes.close()
        self.socket.close(_LINGER_MS)
        self._zap.stop()
