"""A request's answer as it comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from ..core.outputs import RequestOutput
from .collector import RequestCollector
from .delta import Delta


class QueueSink:
    """Deltas in a queue for one waiting thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[list[Delta]] = SimpleQueue()

    def deliver(self, deltas: list[Delta]) -> None:
        """Output thread."""
        self._queue.put(deltas)

    def take(self, timeout: float | None) -> list[Delta]:
        """The waiting thread: the next step's deltas; empty when ``timeout`` seconds passed without."""
        try:
            return self._queue.get(timeout=timeout)
        except Empty:
            return []


class RequestStream(Iterator[RequestOutput]):
    """Iterates over what is new; each ``CompletionOutput`` in it holds the new text, tokens and log-probabilities.

    One thread iterates, any thread may ``cancel()``. Dropping the stream, or leaving its ``with`` block, cancels it.
    Raises what ended the request, if an error did.
    """

    def __init__(self, collector: RequestCollector, sink: QueueSink) -> None:
        self._collector, self._sink = collector, sink
        self._ready: deque[RequestOutput] = deque()

    @property
    def request_id(self) -> str:
        return self._collector.requests[0].external_id

    @property
    def finished(self) -> bool:
        """Whether every choice has ended; parts may still be waiting to be read."""
        return self._collector.finished

    def result(self) -> RequestOutput:
        """All that has come so far."""
        return self._collector.result()

    def cancel(self) -> None:
        """End the request from any thread; what is left of the iteration ends soon, with ``FinishReason.ABORT``."""
        self._collector.cancel()

    def next_delta(self, timeout: float | None = None) -> RequestOutput | None:
        """The next part; ``None`` when ``timeout`` seconds passed without one. Raises ``StopIteration`` at the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ready:
            if self._collector.error is not None:
                raise self._collector.error
            if self._collector.finished:
                raise StopIteration
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            deltas = self._sink.take(left)
            if not deltas:
                return None
            for delta in deltas:
                part = self._collector.take(delta)
                if part is not None and delta.error is None:
                    self._ready.append(part)
        return self._ready.popleft()

    def __next__(self) -> RequestOutput:
        part = self.next_delta()
        assert part is not None
        return part

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()
