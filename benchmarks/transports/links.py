"""One end of a transport that blocks: a function to send, a function to receive, nothing around them.

Every wait ends after ``LIMIT`` with an error, by means that cost a message nothing: socket options, the lock's own
timeout.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from benchmarks.transports.driver import LIMIT

HIGH_WATER_MARK = 256
"""Messages that zmq holds at each end before a sender waits; 64 KB each, they take 32 MB."""


@dataclass(frozen=True, slots=True)
class Link:
    """``receive`` raises when ``LIMIT`` is over."""

    send: Callable[[bytes], object]
    receive: Callable[[], bytes]
    close: Callable[[], object]


def zmq_link(address: str, binds: bool) -> Link:
    """A DEALER at each end, so that neither has to take turns; messages are copied in and out."""
    import zmq

    context: zmq.Context[Any] = zmq.Context.instance()  # inproc:// joins sockets of one context only
    dealer = context.socket(zmq.DEALER)
    configure(dealer, address, binds)
    dealer.RCVTIMEO = dealer.SNDTIMEO = int(LIMIT * 1000)
    return Link(dealer.send, dealer.recv, dealer.close)


def configure(dealer: Any, address: str, binds: bool) -> None:
    """The same for all zmq sockets here, blocking or not."""
    dealer.SNDHWM = dealer.RCVHWM = HIGH_WATER_MARK
    dealer.LINGER = 0
    (dealer.bind if binds else dealer.connect)(address)


_queues: dict[str, tuple[SimpleQueue[bytes], SimpleQueue[bytes]]] = {}


def queue_link(address: str, binds: bool) -> Link:
    """A queue each way between two threads; a reference is handed over, nothing is copied."""
    there, back = _queues.setdefault(address, (SimpleQueue(), SimpleQueue()))
    outbox, inbox = (there, back) if binds else (back, there)
    return Link(outbox.put, functools.partial(inbox.get, timeout=LIMIT), functools.partial(_queues.pop, address, None))


def pipe_link(connection: Connection) -> Link:
    """A duplex pipe's end (a pair of Unix sockets), bytes as they are."""
    limit = struct.pack("ll", int(LIMIT), 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Link(connection.send_bytes, connection.recv_bytes, connection.close)
