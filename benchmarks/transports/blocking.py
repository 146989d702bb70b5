"""Both ends over a link that blocks. Reads side by side with ``coroutines``."""

from __future__ import annotations

import time

from benchmarks.transports.driver import ACK, BURST, END
from benchmarks.transports.links import Link


class Blocking:
    """See ``Driver``."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def ask(self, size: int, seconds: float) -> float:
        send, receive, payload = self._link.send, self._link.receive, bytes(size)
        count, began = 0, time.monotonic()
        while (now := time.monotonic()) - began < seconds:
            send(payload)
            receive()
            count += 1
        send(END)
        return count / (now - began)

    def echo(self) -> None:
        send, receive = self._link.send, self._link.receive
        while message := receive():
            send(message)

    def flood(self, size: int, seconds: float) -> float:
        send, payload = self._link.send, bytes(size)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            for _ in range(BURST):
                send(payload)
        send(END)
        return began

    def drain(self) -> tuple[int, float]:
        receive, count = self._link.receive, 0
        while receive():
            count += 1
        return count, time.monotonic()

    def poke(self, size: int, seconds: float, gap: float) -> list[int]:
        send, receive, payload = self._link.send, self._link.receive, bytes(size)
        sent: list[int] = []
        end = time.monotonic() + seconds
        while not sent or time.monotonic() < end:
            time.sleep(gap)
            sent.append(time.monotonic_ns())
            send(payload)
            receive()
        send(END)
        return sent

    def wake(self) -> tuple[list[int], list[int]]:
        send, receive = self._link.send, self._link.receive
        waiting: list[int] = []
        woken: list[int] = []
        while True:
            since = time.monotonic_ns()
            message = receive()
            now = time.monotonic_ns()
            if not message:
                return waiting, woken
            waiting.append(since)
            woken.append(now)
            send(ACK)

    def close(self) -> None:
        self._link.close()
