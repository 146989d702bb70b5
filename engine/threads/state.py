"""What the threads and the callers share: one lock, one condition, and what they cover."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from ...core.errors import EngineDeadError, EngineError, QueueFullError
from ...core.outputs import FinishReason
from ...core.request import Request
from ..core import EngineCore

Clock = Callable[[], float]


class EngineState:
    """``changed`` is the state lock. It covers the core's books, the inbox, ``version``, ``stopping``, ``dead``
    and ``outage``.

    It is held for drain + schedule + booking and for retiring, never while pushing, collecting, tokenizing, logging or
    calling back, and no other lock is taken under it. ``version`` rises on every submit, abort, retirement, executor
    event and shutdown: the scheduling thread sleeps until it is newer than the one it last looked at, so no wake-up is
    lost and nothing spins.
    """

    def __init__(self, core: EngineCore, *, max_num_waiting: int | None = None, clock: Clock = time.monotonic) -> None:
        self.core = core
        self.clock = clock
        # Reentrant because a stream that is garbage-collected cancels itself, and a collection may start in a thread
        # that holds the lock; what ``abort`` touches may change at any point of a critical section.
        self.changed = threading.Condition(threading.RLock())
        self.version = 0
        self.stopping = False
        self.dead: EngineDeadError | None = None
        self.looked = threading.Event()
        """Set when the scheduling thread has looked at the books and pushed what came of it; see ``OutputThread``."""
        self.outage: str | None = None
        """Why the stages are being started again; ``None`` while they are up."""
        self.num_restarts = 0
        self._max_num_waiting = max_num_waiting
        self._arrivals: deque[Request] = deque()
        self._unanswered: dict[int, Request] = {}
        """Everybody who was taken in and has not been told an end: whatever breaks, they are to hear of it."""
        self._aborts: deque[tuple[int, FinishReason]] = deque()

    # -- any thread

    def submit(self, requests: Iterable[Request]) -> None:
        """Append to the inbox, all or none. Raises ``EngineDeadError`` or ``QueueFullError``."""
        requests = list(requests)
        with self.changed:
            self.raise_if_over()
            waiting = self.core.num_waiting + len(self._arrivals)
            if self._max_num_waiting is not None and waiting + len(requests) > self._max_num_waiting:
                raise QueueFullError(f"{waiting} requests wait already; max_num_waiting is {self._max_num_waiting}")
            self._arrivals.extend(requests)
            self._unanswered.update((request.request_id, request) for request in requests)
            self.bump()

    def abort(self, request_ids: Iterable[int], reason: FinishReason = FinishReason.ABORT) -> None:
        """Ask for these requests to end; each is told through its sink. Ids that ended already are ignored."""
        with self.changed:
            self._aborts.extend((request_id, reason) for request_id in request_ids)
            self.bump()

    def stop(self) -> None:
        """Tell both threads to end."""
        with self.changed:
            self.stopping = True
            self.bump()

    def die(self, cause: BaseException) -> None:
        """Record the first cause of the engine's death; everybody is failed by the output thread."""
        with self.changed:
            if self.dead is None:
                what = str(cause) if isinstance(cause, EngineError) else repr(cause)
                self.dead = EngineDeadError(f"the engine is dead: {what}")
                self.dead.__cause__ = cause
            self.bump()

    def answered(self, request_ids: Iterable[int]) -> None:
        """These were told their end. Output thread."""
        with self.changed:
            for request_id in request_ids:
                self._unanswered.pop(request_id, None)

    def notify(self) -> None:
        """Something outside the books changed (a user's resource): look again."""
        with self.changed:
            self.bump()

    # -- under the lock

    def bump(self) -> None:
        self.version += 1
        self.changed.notify_all()

    @property
    def over(self) -> bool:
        return self.stopping or self.dead is not None

    @property
    def unready_reason(self) -> str | None:
        """Why a request would not be begun now, in a line; ``None`` when it would."""
        if self.dead is not None:
            return str(self.dead).partition("\n")[0]
        if self.stopping:
            return "the engine is closed"
        outage = self.outage  # read once: it may end meanwhile
        return f"{outage}; the stages are being started again" if outage is not None else None

    def raise_if_over(self) -> None:
        if self.over:
            raise self.death("the engine is closed")

    def death(self, otherwise: str) -> EngineDeadError:
        """An error of its own for each who is told, since raising one adds to its traceback; ``otherwise`` is what it
        says where the engine was merely closed."""
        if self.dead is None:
            return EngineDeadError(otherwise)
        error = EngineDeadError(*self.dead.args)
        error.__cause__ = self.dead.__cause__
        return error

    def drain_inbox(self, now: float) -> None:
        """Carry arrivals and aborts into the books, arrivals first: an abort never overtakes its request."""
        while self._arrivals:
            self.core.add(self._arrivals.popleft(), now)
        while self._aborts:
            request_id, reason = self._aborts.popleft()
            self.core.abort(request_id, now, reason)

    def take_everybody(self) -> list[Request]:
        """Every request that was not told an end, wherever it is; the engine is over."""
        everybody = list(self._unanswered.values())
        self._unanswered.clear()
        self._arrivals.clear()
        self._aborts.clear()
        return everybody
