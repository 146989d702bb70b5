"""Both ends over ``zmq.asyncio``, one task in the event loop. Reads side by side with ``blocking``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TypeVar

import zmq
import zmq.asyncio

from benchmarks.transports.driver import ACK, BURST, END, LIMIT
from benchmarks.transports.links import configure

T = TypeVar("T")


class Coroutines:
    """See ``Driver``. One timer over a whole measurement keeps it from hanging: a timer per message would cost."""

    def __init__(
        self, address: str, binds: bool, new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    ) -> None:
        self._runner = asyncio.Runner(loop_factory=new_loop)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._run(self._open(address, binds), LIMIT)

    async def _open(self, address: str, binds: bool) -> zmq.asyncio.Socket:
        dealer = self._context.socket(zmq.DEALER)
        configure(dealer, address, binds)
        return dealer

    def _run(self, work: Coroutine[None, None, T], limit: float) -> T:
        return self._runner.run(asyncio.wait_for(work, limit))  # type: ignore[arg-type]

    def ask(self, size: int, seconds: float) -> float:
        return self._run(self._ask(size, seconds), seconds + LIMIT)

    def echo(self) -> None:
        self._run(self._echo(), 2 * LIMIT)

    def flood(self, size: int, seconds: float) -> float:
        return self._run(self._flood(size, seconds), seconds + LIMIT)

    def drain(self) -> tuple[int, float]:
        return self._run(self._drain(), 2 * LIMIT)

    def poke(self, size: int, seconds: float, gap: float) -> list[int]:
        return self._run(self._poke(size, seconds, gap), seconds + LIMIT)

    def wake(self) -> tuple[list[int], list[int]]:
        return self._run(self._wake(), 2 * LIMIT)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self._runner.close()

    async def _ask(self, size: int, seconds: float) -> float:
        send, receive, payload = self._socket.send, self._socket.recv, bytes(size)
        count, began = 0, time.monotonic()
        while (now := time.monotonic()) - began < seconds:
            await send(payload)
            await receive()
            count += 1
        await send(END)
        return count / (now - began)

    async def _echo(self) -> None:
        send, receive = self._socket.send, self._socket.recv
        while message := await receive():
            await send(message)

    async def _flood(self, size: int, seconds: float) -> float:
        send, payload = self._socket.send, bytes(size)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            for _ in range(BURST):
                await send(payload)
        await send(END)
        return began

    async def _drain(self) -> tuple[int, float]:
        receive, count = self._socket.recv, 0
        while await receive():
            count += 1
        return count, time.monotonic()

    async def _poke(self, size: int, seconds: float, gap: float) -> list[int]:
        send, receive, payload = self._socket.send, self._socket.recv, bytes(size)
        sent: list[int] = []
        end = time.monotonic() + seconds
        while not sent or time.monotonic() < end:
            await asyncio.sleep(gap)
            sent.append(time.monotonic_ns())
            await send(payload)
            await receive()
        await send(END)
        return sent

    async def _wake(self) -> tuple[list[int], list[int]]:
        send, receive = self._socket.send, self._socket.recv
        waiting: list[int] = []
        woken: list[int] = []
        while True:
            since = time.monotonic_ns()
            message = await receive()
            now = time.monotonic_ns()
            if not message:
                return waiting, woken
            waiting.append(since)
            woken.append(now)
            await send(ACK)
