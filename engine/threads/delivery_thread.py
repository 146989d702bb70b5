"""The thread that turns deltas into results for the library's futures and runs their callbacks."""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue

from ...core.outputs import RequestOutput
from ..collector import RequestCollector
from ..delta import Delta

logger = logging.getLogger(__name__)


class FutureSink:
    """Where the deltas of one future's requests go, and what becomes of them; cancelling the future ends them."""

    def __init__(self, inbox: SimpleQueue[tuple[FutureSink, list[Delta]] | None]) -> None:
        self._inbox = inbox
        self._collector: RequestCollector | None = None
        self.future: Future[RequestOutput] = Future()

    def deliver(self, deltas: list[Delta]) -> None:
        """Output thread."""
        self._inbox.put((self, deltas))

    def collect_with(self, collector: RequestCollector) -> Future[RequestOutput]:
        """The future that this collector's requests resolve; call before they are submitted."""
        self._collector = collector

        def cancel_too(future: Future[RequestOutput]) -> None:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # else ``concurrent.futures.wait`` would not count it as done
                collector.cancel()

        self.future.add_done_callback(cancel_too)
        return self.future

    def take(self, deltas: list[Delta]) -> None:
        """Delivery thread: add them; the last one resolves the future. What goes wrong fails this future only."""
        collector = self._collector
        assert collector is not None
        if self.future.done():
            return
        try:
            for delta in deltas:
                collector.take(delta)
            if not collector.finished:
                return
            outcome: RequestOutput | BaseException = collector.error or collector.result()
        except Exception as error:  # noqa: BLE001 - told to whoever waits for this future
            collector.cancel()
            outcome = error
        with contextlib.suppress(InvalidStateError):  # cancelled by its owner just now
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class DeliveryThread:
    """One for all futures of an engine, started by the first ``submit``. It detokenizes, finds stop strings, resolves.

    It ends after ``close``, when all that was delivered is resolved.
    """

    def __init__(self, name: str) -> None:
        self._inbox: SimpleQueue[tuple[FutureSink, list[Delta]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def sink(self) -> FutureSink:
        """For the requests of one future."""
        return FutureSink(self._inbox)

    def close(self) -> None:
        """Nothing more will be delivered. Output thread."""
        self._inbox.put(None)

    def run(self) -> None:
        """The loop."""
        while (item := self._inbox.get()) is not None:
            sink, deltas = item
            try:
                sink.take(deltas)
            except BaseException:  # a callback that raises SystemExit must not leave the others waiting
                logger.exception("a callback ended with an exception")
            del item, sink, deltas  # or the last answer would live until the next one
