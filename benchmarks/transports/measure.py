"""All measurements of one transport, in a process of its own: python -m benchmarks.transports.measure NAME --seconds S

Prints one JSON line per payload and neighbour. What is measured are the threads of this process; the busy neighbour
lives here too. The other end is a child, or a thread where the transport joins threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.transports.driver import LIMIT, BusyNeighbour, Driver, hear, percentile, serve, tell
from benchmarks.transports.kinds import NEIGHBOURS, PAYLOADS, TRANSPORTS, Transport

GAP = {"idle": 0.0015, "busy": 0.02}
"""Seconds of quiet before a message that is to find its receiver asleep. A busy neighbour may keep it from going to
sleep for several turns of the interpreter lock, 5 ms each."""
WAKE_SHARE = {"idle": 1, "busy": 4}
"""How much longer than the others the wake-ups are measured, since most of the time is quiet."""
ASLEEP_NS = 200_000
"""A wake-up counts when its receiver began to wait this long before the message was sent."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(TRANSPORTS))
    parser.add_argument("--seconds", type=float, required=True, help="seconds for each figure")
    parser.add_argument("--switch-interval", type=float, required=True, help="of the interpreter lock, milliseconds")
    args = parser.parse_args()
    sys.setswitchinterval(args.switch_interval / 1000)
    with joined(args.name, TRANSPORTS[args.name]) as (driver, control):
        round_trips(driver, control, 64, args.seconds / 5)  # connecting, first allocations
        for payload, size in PAYLOADS.items():
            for neighbour in NEIGHBOURS:
                with BusyNeighbour() if neighbour == "busy" else nullcontext():
                    found = measure(driver, control, size, neighbour, args.seconds)
                print(json.dumps({"payload": payload, "neighbour": neighbour, **found}), flush=True)


def measure(driver: Driver, control: Connection, size: int, neighbour: str, seconds: float) -> dict[str, Any]:
    """The three figures of one row."""
    waits = wake_ups(driver, control, size, seconds * WAKE_SHARE[neighbour], GAP[neighbour])
    return {
        "round_trips_per_s": round_trips(driver, control, size, seconds),
        "messages_per_s": one_way(driver, control, size, seconds),
        "wake_p50_us": percentile(waits, 0.5),
        "wake_p99_us": percentile(waits, 0.99),
        "wake_ups": len(waits),
    }


def round_trips(driver: Driver, control: Connection, size: int, seconds: float) -> float:
    """This end asks."""
    tell(control, do="echo")
    found = driver.ask(size, seconds)
    hear(control)
    return found


def one_way(driver: Driver, control: Connection, size: int, seconds: float) -> float:
    """This end receives; from the first send to the last receive."""
    tell(control, do="flood", size=size, seconds=seconds)
    count, end = driver.drain()
    return count / (end - hear(control)["done"])


def wake_ups(driver: Driver, control: Connection, size: int, seconds: float, gap: float) -> list[float]:
    """Microseconds from send to this end running again, of those that found it asleep."""
    tell(control, do="poke", size=size, seconds=seconds, gap=gap)
    waiting, woken = driver.wake()
    sent = hear(control)["done"]
    waits = [(now - at) / 1000 for since, at, now in zip(waiting, sent, woken, strict=True) if at - since >= ASLEEP_NS]
    if not waits:
        raise RuntimeError(f"none of {len(sent)} messages found the receiver asleep")
    return waits


@contextmanager
def joined(name: str, transport: Transport) -> Iterator[tuple[Driver, Connection]]:
    """This end, and the control pipe to the other one, which is up; it is ended and waited for on the way out."""
    with tempfile.TemporaryDirectory(prefix="transport-") as folder:
        address = f"ipc://{folder}/socket" if transport.processes else "inproc://transport"
        control, its_control = Pipe()
        pipe, its_pipe = Pipe() if name == "pipe" else (None, None)
        driver = transport.make(address, pipe, True)
        other_end = _process if transport.processes else _thread
        try:
            with other_end(name, transport, address, its_control, its_pipe):
                try:
                    hear(control)
                    yield driver, control
                    tell(control, do="end")
                finally:
                    control.close()  # whatever it waits for next, it learns that nobody is there
        finally:
            driver.close()


@contextmanager
def _process(name: str, _: Transport, address: str, control: Connection, pipe: Connection | None) -> Iterator[None]:
    ends = [end for end in (control, pipe) if end is not None]
    numbers = [end.fileno() for end in ends]
    command = [sys.executable, "-m", "benchmarks.transports.peer", name, address, *map(str, numbers)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=numbers)
    for end in ends:
        end.close()
    try:
        yield
        if code := process.wait(LIMIT):
            raise RuntimeError(f"the other end exited with {code}")
    finally:
        process.kill()
        process.wait()


@contextmanager
def _thread(_: str, transport: Transport, address: str, control: Connection, pipe: Connection | None) -> Iterator[None]:
    thread = threading.Thread(
        target=lambda: serve(control, transport.make(address, pipe, False)), name="other-end", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        thread.join(LIMIT)
        control.close()


if __name__ == "__main__":
    main()
