"""The short way of sampled tokens from the last stage back to the first, where both are processes of one host.

A pair of sockets that the two inherit: nobody else can reach it, so there is nothing to find, to join or to prove. A
message goes from one stage's main thread to the other's. Over zmq it would pass a thread for sockets at either end, and
these wake-ups took half of the time from the last stage's end to the first one's beginning.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

_NOW = int(socket.MSG_DONTWAIT)  # a plain number: see ``links``
_BYTES_A_TOKEN = 5
"""At most, as it travels."""
_BYTES_A_MESSAGE = 2048
"""What the system counts for a message beside its content, and more."""


class RingFullError(Exception):
    """More was under way than ``ring_ends`` was told of."""


class Ring:
    """One end of it. For the stage's main thread; any thread may ``cut`` it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._buffer = memoryview(bytearray(_room(self._socket)))

    def send(self, frame: bytes) -> None:
        """Hand a message over. Waits for nobody: there is room for all that can be under way (``ring_ends``). Raises
        ``RingFullError`` where more is than was said."""
        try:
            self._socket.send(frame, _NOW)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other stage has ended, or this one is to; the engine knows
        except BlockingIOError:
            raise RingFullError(
                "sampled tokens of more plans are under way to the first stage than this pipeline has room for: set "
                "num_queues to as many as the scheduler asks for"
            ) from None

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
        with contextlib.suppress(OSError):  # the other end was closed
            self._socket.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def ring_ends(max_num_seqs: int, num_queues: int) -> Iterator[tuple[int, int] | None]:
    """Descriptors of the two ends, for whoever inherits them; closed in the end. ``None`` where the system holds less
    than may be under way: a plan for each queue and one more, each request in two of them at most."""
    # Twice the bytes: the system counts the memory that they take, which comes in powers of two.
    needed = 2 * (2 * max_num_seqs * _BYTES_A_TOKEN) + (num_queues + 1) * _BYTES_A_MESSAGE
    first, last = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with first, last:
        for end in (first, last):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, max(needed, _room(end)) // 2)  # which is then doubled
        yield (first.fileno(), last.fileno()) if needed <= _room(last) else None


def _room(end: socket.socket) -> int:
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
