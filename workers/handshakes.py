"""Whether the connections of a socket come about: what a wrong key looks like."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import zmq

_EVENT = struct.Struct("=Hi")
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)


class HandshakeMonitor:
    """Owned by the socket's thread; ``socket`` is readable when there is something to ``take``."""

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED
        for event in _FAILED:
            events |= event
        self.socket: zmq.Socket[Any] = watched.get_monitor_socket(events)
        self.is_refused = False
        """Whether a connection was refused by name: this end is known, and not let in."""
        self._watched = watched

    def take(self) -> Iterator[bool]:
        """What has happened since, in order: for each handshake whether it failed."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event, _ = _EVENT.unpack(frames[0])
            self.is_refused |= event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            yield event in _FAILED

    def close(self) -> None:
        self._watched.disable_monitor()
        self.socket.close(0)
