"""The thread that turns deltas into results for the library's futures and runs their callbacks."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue

from ...core.outputs import RequestOutput
from ..collector import RequestCollector
from ..delta import Delta
from .state import EngineState

logger = logging.getLogger(__name__)


class DeliveryThread:
    """One for all futures of an engine, started by the first ``submit``. It detokenizes, finds stop strings, resolves.

    It is also the sink of the futures' requests. It ends after ``close``, when all that was delivered is resolved.
    """

    def __init__(self, state: EngineState, name: str) -> None:
        self._state = state
        self._inbox: SimpleQueue[list[Delta] | tuple[RequestCollector, Future[RequestOutput]] | None] = SimpleQueue()
        self._waiting: dict[int, tuple[RequestCollector, Future[RequestOutput]]] = {}
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def deliver(self, deltas: list[Delta]) -> None:
        """Output thread."""
        self._inbox.put(deltas)

    def register(self, collector: RequestCollector) -> Future[RequestOutput]:
        """A future for these requests; call before they are submitted. Cancelling it ends them."""
        future: Future[RequestOutput] = Future()
        future.add_done_callback(lambda done: self._state.abort(collector.request_ids) if done.cancelled() else None)
        self._inbox.put((collector, future))
        return future

    def close(self) -> None:
        """Nothing more will be delivered."""
        self._inbox.put(None)

    def run(self) -> None:
        """The loop."""
        while (item := self._inbox.get()) is not None:
            try:
                self._take(item)
            except BaseException as error:  # noqa: BLE001 - no future may be left waiting
                self._state.die(error)
                logger.exception("the delivery thread failed")
                for _, future in self._waiting.values():
                    _resolve(future, error)
                self._waiting.clear()

    def _take(self, item: list[Delta] | tuple[RequestCollector, Future[RequestOutput]]) -> None:
        if isinstance(item, tuple):
            self._waiting.update((request_id, item) for request_id in item[0].request_ids)
            return
        for delta in item:
            entry = self._waiting.get(delta.request.request_id)
            if entry is None:
                continue
            collector, future = entry
            collector.take(delta)
            if collector.finished:
                for request_id in collector.request_ids:
                    del self._waiting[request_id]
                _resolve(future, collector.error or collector.result())


def _resolve(future: Future[RequestOutput], outcome: RequestOutput | BaseException) -> None:
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass  # cancelled by its owner
