"""The deltas of several streams in one iterator, for requests that bring several prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..core.outputs import RequestOutput

if TYPE_CHECKING:
    from ..engine.stream import RequestStream

_Item = tuple[int, RequestOutput | BaseException | None]


def fan_in(streams: Sequence[RequestStream]) -> Iterator[tuple[int, RequestOutput]]:
    """Each stream's deltas with its position, as they come. Raises the first error of any stream.

    A stream finds its stop strings while it is read, so all are read at once, by a thread each; one stream is read by
    the caller itself. The threads end with their streams: whoever stops iterating early must cancel those.
    """
    if len(streams) == 1:
        for part in streams[0]:
            yield 0, part
        return
    items: SimpleQueue[_Item] = SimpleQueue()
    for position, stream in enumerate(streams):
        name = f"llm-engine-fan-in-{position}"
        threading.Thread(target=_read, args=(position, stream, items), name=name, daemon=True).start()
    running = len(streams)
    while running:
        position, item = items.get()
        if item is None:
            running -= 1
        elif isinstance(item, BaseException):
            raise item
        else:
            yield position, item


def _read(position: int, stream: RequestStream, items: SimpleQueue[_Item]) -> None:
    try:
        for part in stream:
            items.put((position, part))
        items.put((position, None))
    except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
        items.put((position, error))
