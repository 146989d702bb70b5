"""The short way of sampled tokens from the last stage back to the first, where both are processes of one host.

    with ring_ends(need) as ends:
        ...  # start the two with a descriptor each

A pair of sockets that the two inherit: nobody else can reach it, so there is nothing to find, to join or to prove. A
message goes from one stage's thread to the other's. Over zmq it would pass a thread for sockets at either end, and these
wake-ups took half of the time from the last stage's end to the first one's beginning.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

_NOW = int(socket.MSG_DONTWAIT)  # a plain number: see ``links``
_ROOM_A_MESSAGE = 2048
"""Bytes that the system counts for a message beside what is in it, and more."""


class Ring:
    """One end of it. For the stage's main thread; any thread may ``cut`` it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._buffer = memoryview(bytearray(_room(self._socket)))

    def send(self, frame: bytes) -> None:
        """Hand a message over. There is room for all that can be under way (``ring_ends``), so this waits for nobody."""
        try:
            self._socket.send(frame)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other stage has ended, or this one is to; the engine knows

    def receive(self, *, wait: bool) -> memoryview | None:
        """The next message, valid until the next call. ``None`` where there is none and none is to be waited for, and
        from then on that the other stage has ended, or the ring was cut."""
        try:
            size = self._socket.recv_into(self._buffer, 0, 0 if wait else _NOW)
        except (BlockingIOError, ConnectionResetError):
            return None
        return self._buffer[:size] if size else None

    def cut(self) -> None:
        """Whoever waits at either end waits no longer. Callable twice."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is


@contextmanager
def ring_ends(num_bytes: int, num_messages: int) -> Iterator[tuple[int, int] | None]:
    """Descriptors of the two ends, closed in the end: who inherits one has it for itself. ``None`` where the system does
    not hold so many messages, of so many bytes together, that nobody has taken yet."""
    first, last = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with first, last:
        # Twice the bytes: the system counts the memory it takes for them, in powers of two.
        has_room = 2 * num_bytes + _ROOM_A_MESSAGE * num_messages <= _room(last)
        yield (first.fileno(), last.fileno()) if has_room else None


def _room(end: socket.socket) -> int:
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
