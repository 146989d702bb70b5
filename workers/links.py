"""The data sockets between stages: one way each, messages in order, of one epoch, from peers that know its token."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from .wire import HEADER_BYTES, MAX_FRAME, Buffer, Kind, WireError, pack_header, unpack_header

logger = logging.getLogger(__name__)

# Plain numbers, frame by frame below, and the socket's own ``send`` without what pyzmq wraps around it: behind a
# forward nothing of that is in the caches, and what costs next to nothing in a loop takes 5 to 20 microseconds there,
# which the next stage waits for.
_NOW, _NOW_AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_send = zmq.backend.Socket.send
STOP_ADDRESS = "inproc://stop"
"""Where a stage's side thread reaches the thread that waits for messages."""
_WARN_FIRST = 5
"""Messages of strangers that are logged; more of them are counted."""


Received = tuple[Kind, list[memoryview]]
"""One message of a peer: what it is, and its frames without the header. The memory is the message's own and stays as
long as a buffer is referred to."""


def data_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    """A socket that never blocks its sender and keeps nothing back when it is closed."""
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME)
    return socket


class Inbound:
    """The receiving end: a PULL socket that is bound. Owned by one thread.

    ``senders`` says who sends which kind of message, for the blame; -1 is the engine.
    """

    def __init__(self, socket: zmq.Socket[Any], token: bytes, senders: dict[Kind, int]) -> None:
        self.socket = socket
        self._token = token
        self._senders = senders
        self._next = dict.fromkeys(senders, 0)
        self._num_strangers = 0

    def receive(self, *, wait: bool = False) -> Received | None:
        """The next message; ``None`` where what came was a stranger's, or nothing is there and is not to be waited for.

        Raises ``PeerError`` for what a peer should not have sent.
        """
        try:
            frame = self.socket.recv(0 if wait else _NOW, copy=False)
            buffers = [frame.buffer]
            while frame.more:
                frame = self.socket.recv(_NOW, copy=False)
                buffers.append(frame.buffer)
        except zmq.Again:
            return None
        first = buffers[0]
        try:
            token, kind, number = unpack_header(first)
        except WireError as error:
            self._drop(str(error))
            return None
        if token != self._token:
            self._drop("a wrong token")
            return None
        due = self._next.get(kind)
        if due is None:
            raise PeerError(None, f"a {kind.name} message, which does not belong here")
        if number != due:
            raise PeerError(self._senders[kind], f"{kind.name} {number} follows {due - 1}")
        self._next[kind] = due + 1
        buffers[0] = first[HEADER_BYTES:]
        return kind, buffers

    def sender(self, kind: Kind) -> int:
        return self._senders[kind]

    def close(self) -> None:
        self.socket.close(0)

    def _drop(self, why: str) -> None:
        self._num_strangers += 1
        if self._num_strangers <= _WARN_FIRST:
            more = "; more of them are dropped in silence" if self._num_strangers == _WARN_FIRST else ""
            logger.warning("a message from a stranger was dropped: %s%s", why, more)


class PeerError(WireError):
    """What a peer sent is nonsense. ``sender`` is its stage, -1 for the engine, ``None`` where nobody knows."""

    def __init__(self, sender: int | None, what: str) -> None:
        super().__init__(what)
        self.sender = sender


class Outbound:
    """The sending end: a PUSH socket that is connected. Owned by one thread."""

    def __init__(self, socket: zmq.Socket[Any], token: bytes) -> None:
        self._socket = socket
        self._token = token
        self._next = dict.fromkeys(Kind, 0)

    def send(self, kind: Kind, first: Buffer, *others: Any) -> None:
        """Queue a message; never blocks. All is copied."""
        header = pack_header(self._token, kind, self._next[kind])
        self._next[kind] += 1
        frame = b"".join((header, first))
        for other in others:
            _send(self._socket, frame, _NOW_AND_MORE)
            frame = other
        _send(self._socket, frame, _NOW)

    def close(self) -> None:
        self._socket.close(0)
