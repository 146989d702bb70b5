"""Which transports are measured, and how each is made. What a transport needs is imported when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.transports.driver import Driver

PAYLOADS = {"64 B": 64, "64 KB": 64 * 1024}
NEIGHBOURS = ("idle", "busy")


@dataclass(frozen=True, slots=True)
class Transport:
    """One way to hand over a message. Both ends are of the same kind."""

    title: str
    processes: bool
    """Whether the ends are two processes; else two threads of one."""
    make: Callable[[str, Connection | None, bool], Driver]
    """Called at one end with the address to meet at, the pipe's end where one is used, and whether it is the end that
    binds."""
    needs: str = ""
    """A module that is not always there."""

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here; ``None`` where it can."""
        return f"{self.needs} is not installed" if self.needs and find_spec(self.needs) is None else None


def _asyncio(address: str, _: Connection | None, binds: bool) -> Driver:
    from benchmarks.transports.coroutines import Coroutines

    return Coroutines(address, binds)


def _uvloop(address: str, _: Connection | None, binds: bool) -> Driver:
    import uvloop

    from benchmarks.transports.coroutines import Coroutines

    return Coroutines(address, binds, uvloop.new_event_loop)


def _zmq(address: str, _: Connection | None, binds: bool) -> Driver:
    from benchmarks.transports.blocking import Blocking
    from benchmarks.transports.links import zmq_link

    return Blocking(zmq_link(address, binds))


def _queue(address: str, _: Connection | None, binds: bool) -> Driver:
    from benchmarks.transports.blocking import Blocking
    from benchmarks.transports.links import queue_link

    return Blocking(queue_link(address, binds))


def _pipe(_: str, connection: Connection | None, binds: bool) -> Driver:
    from benchmarks.transports.blocking import Blocking
    from benchmarks.transports.links import pipe_link

    assert connection is not None
    return Blocking(pipe_link(connection))


TRANSPORTS = {
    "asyncio": Transport("zmq.asyncio, 2 processes", True, _asyncio),
    "uvloop": Transport("zmq.asyncio on uvloop, 2 processes", True, _uvloop, needs="uvloop"),
    "zmq-ipc": Transport("blocking zmq, 2 processes", True, _zmq),
    "zmq-inproc": Transport("blocking zmq, 2 threads", False, _zmq),
    "queue": Transport("SimpleQueue, 2 threads", False, _queue),
    "pipe": Transport("multiprocessing pipe, 2 processes", True, _pipe),
}
