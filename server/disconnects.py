"""Notices that a client has gone, whatever its request is doing: waiting, prefilling or streaming."""

from __future__ import annotations

import contextlib
import logging
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("llm_engine.server")

_GONE = select.EPOLLRDHUP | select.EPOLLHUP


class DisconnectWatcher:
    """One thread that calls back, once, when a watched connection's peer has closed it.

    A client that only closes its sending half counts as gone. Bytes that arrive meanwhile (a pipelined request) are
    none of its business: it asks the kernel for hang-ups alone. ``start`` in the process that serves, after any fork.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Covers the table and every change of the epoll set. Callbacks run outside it."""
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self._thread = threading.Thread(target=self._run, name="llm-engine-disconnects", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @contextlib.contextmanager
    def watch(self, sock: Any, gone: Callable[[], None]) -> Iterator[None]:
        """Call ``gone`` from the watcher's thread if the peer leaves while the block runs.

        The socket must stay open within the block. ``gone`` may run a moment after the block has ended.
        """
        fd = sock.fileno()
        with self._lock:
            self._callbacks[fd] = gone
            self._epoll.register(fd, _GONE)
        try:
            yield
        finally:
            with self._lock:
                if self._callbacks.get(fd) is gone:
                    del self._callbacks[fd]
                    with contextlib.suppress(OSError):  # closed already: the kernel has dropped it
                        self._epoll.unregister(fd)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                gone = self._take(fd)
                if gone is None:
                    continue
                try:
                    gone()
                except Exception:  # one request's trouble must not blind the watcher for all others
                    log.exception("cancelling a request whose client has gone")

    def _take(self, fd: int) -> Callable[[], None] | None:
        """The callback of a descriptor that has hung up, taken out of the table.

        Between ``poll`` and here the descriptor may have been closed and given to another connection, so the event
        alone proves nothing: the descriptor is asked again, under the lock that keeps it registered and open.
        """
        with self._lock:
            if fd not in self._callbacks or not _hung_up(fd):
                return None
            self._epoll.unregister(fd)
            return self._callbacks.pop(fd)


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
