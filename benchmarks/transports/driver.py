"""What both ends of a transport can do, and how they are told to over a control pipe."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

LIMIT = 20.0
"""Seconds after which a wait that should have ended long ago is an error."""
BURST = 8
"""Messages that a flood sends between two looks at the clock."""
END = b""
"""The message after the last one; its receiver goes back to its orders."""
ACK = b"."


class Driver(Protocol):
    """One end. A measurement is one call at each end at the same time: ``ask`` and ``echo``, ``drain`` and ``flood``,
    ``wake`` and ``poke``. Clocks are ``time.monotonic``, which all processes of a machine share."""

    def ask(self, size: int, seconds: float) -> float:
        """Round trips per second, of requests and replies of ``size`` bytes."""

    def echo(self) -> None:
        """Answer each message with itself."""

    def flood(self, size: int, seconds: float) -> float:
        """Send without waiting for anybody but a full buffer; when it began."""

    def drain(self) -> tuple[int, float]:
        """Receive up to the end: how many, and when that was."""

    def poke(self, size: int, seconds: float, gap: float) -> list[int]:
        """Be quiet for ``gap`` seconds, send, wait for a sign, again: when each was sent, in nanoseconds."""

    def wake(self) -> tuple[list[int], list[int]]:
        """Receive up to the end, giving a sign after each: since when each was waited for, and when the code behind the
        wait ran, in nanoseconds."""

    def close(self) -> None:
        """Give everything back."""


def tell(control: Connection, **words: Any) -> None:
    """Say something to the other end, beside the transport that is measured."""
    control.send_bytes(json.dumps(words).encode())


def hear(control: Connection) -> dict[str, Any]:
    """What the other end says. Raises ``TimeoutError``, or ``EOFError`` when it is gone."""
    if not control.poll(LIMIT):
        raise TimeoutError(f"the other end has said nothing for {LIMIT:.0f} s")
    words: dict[str, Any] = json.loads(control.recv_bytes())
    return words


def serve(control: Connection, driver: Driver) -> None:
    """The other end's life: follow orders until there are no more, then close."""
    try:
        deeds: dict[str, Callable[..., Any]] = {"echo": driver.echo, "flood": driver.flood, "poke": driver.poke}
        tell(control, ready=True)
        while (deed := (order := hear(control)).pop("do")) != "end":
            tell(control, done=deeds[deed](**order))
    finally:
        driver.close()
        control.close()


class BusyNeighbour:
    """A thread of pure Python that wants the interpreter lock all the time, while the ``with`` block runs."""

    def __init__(self) -> None:
        self._stop = False
        self._thread = threading.Thread(target=self._spin, name="neighbour", daemon=True)

    def _spin(self) -> None:
        value = 1
        while not self._stop:
            value = (value * 69069 + 1) & 0xFFFFFFFF

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join(LIMIT)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed. Raises ``ValueError`` without any."""
    if not values:
        raise ValueError("values: none given, at least one needed")
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * round(share * 1000) // 1000) - 1, 0)]
