"""Two stages on two hosts, made of network namespaces: encrypted links over a wire of 1 Gbit/s and 0.2 ms.

    sudo python -m benchmarks.pipeline_hosts --model DIR

Needs root, ``ip`` and /dev/net/tun, and no other machine: each namespace gets a TUN device, and this process is the
wire between them. A packet leaves when the one before it has gone, at the rate, and arrives after the delay. The wire
is tried first (round trip, throughput); then the same mixes run over it and over local sockets. It takes its share of
the same cores, so what it costs is rather less where the wire is one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.children import ROOT, json_lines
from benchmarks.report import Spread, markdown_table

NAMESPACES = ("llm-engine-a", "llm-engine-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 5600
MTU = 9000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MIXES = ("decode", "prefill")


class Wire(threading.Thread):
    """Carries packets from one TUN device to another: one direction."""

    def __init__(self, source: int, target: int, rate: float, delay: float) -> None:
        super().__init__(daemon=True)
        self._source, self._target, self._rate, self._delay = source, target, rate, delay
        self.num_bytes = 0
        self.stopping = False

    def run(self) -> None:
        """Until ``stopping``."""
        queue: deque[tuple[float, bytes]] = deque()
        free = 0.0
        while not self.stopping:
            wait = max(queue[0][0] - time.monotonic(), 0.0) if queue else 0.2
            if select.select([self._source], [], [], wait)[0]:
                packet = os.read(self._source, MTU + 100)
                free = max(free, time.monotonic()) + 8 * len(packet) / self._rate
                self.num_bytes += len(packet)
                queue.append((free + self._delay, packet))
            while queue and queue[0][0] <= time.monotonic():
                with suppress(OSError):  # a device that is down loses packets, as wires do
                    os.write(self._target, queue[0][1])
                queue.popleft()


@contextmanager
def hosts(rate: float, delay: float) -> Iterator[list[Wire]]:
    """Two namespaces and the wire between them."""
    devices = []
    try:
        for name, address in zip(NAMESPACES, ADDRESSES, strict=True):
            device = os.open("/dev/net/tun", os.O_RDWR)
            devices.append(device)
            link = f"tun{name[-1]}-{os.getpid()}"[:15]
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", link.encode(), _IFF_TUN | _IFF_NO_PI))
            _ip("netns", "add", name)
            _ip("link", "set", link, "netns", name)
            inside = ("-n", name)
            _ip(*inside, "addr", "add", f"{address}/24", "dev", link)
            _ip(*inside, "link", "set", link, "mtu", str(MTU), "up")
            _ip(*inside, "link", "set", "lo", "up")
        wires = [Wire(devices[0], devices[1], rate, delay), Wire(devices[1], devices[0], rate, delay)]
        for wire in wires:
            wire.start()
        yield wires
        for wire in wires:
            wire.stopping = True
            wire.join()
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
        for device in devices:
            os.close(device)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def inside(host: int, *command: str) -> list[str]:
    """The command as it is run on one of the hosts."""
    return ["ip", "netns", "exec", NAMESPACES[host], *command]


_SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 5599)) as server:
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(200):
        peer.sendall(peer.recv(1))
    left = 1 << 25
    while left:
        left -= len(peer.recv(min(left, 1 << 20)))
    peer.sendall(b"x")
"""
_CLIENT = """
import json, socket, statistics, sys, time
for _ in range(100):
    try:
        peer = socket.create_connection((sys.argv[1], 5599))
        break
    except OSError:
        time.sleep(0.05)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
trips = []
for _ in range(200):
    began = time.perf_counter(); peer.sendall(b"x"); peer.recv(1); trips.append(time.perf_counter() - began)
began = time.perf_counter(); peer.sendall(bytes(1 << 25)); peer.recv(1)
print(json.dumps({"round_trip_ms": 1e3 * statistics.median(trips),
                  "gbit_s": 8e-9 * (1 << 25) / (time.perf_counter() - began)}))
"""


def try_wire() -> dict[str, float]:
    """What a plain TCP connection finds: round trip and throughput."""
    server = subprocess.Popen(inside(1, sys.executable, "-c", _SERVER, ADDRESSES[1]))
    try:
        (found,) = json_lines(inside(0, sys.executable, "-c", _CLIENT, ADDRESSES[1]), 60.0)
    finally:
        server.kill()
        server.wait()
    return found


def task(args: argparse.Namespace, mix: str, seed: int, **settings: Any) -> str:
    """For ``benchmarks.pipeline_turn``: two stages on a core each."""
    common = {
        "model": str(args.model.resolve()), "dtype": "bfloat16", "kv_cache_memory": 1 << 30, "executor": "zmq",
        "pipeline_parallel_size": 2, "cpu_threads": 1, "scheduler": "balanced",
    }  # fmt: skip
    return json.dumps({"name": "hosts", "mix": mix, "seed": seed, "settings": common | settings})


def over_the_wire(args: argparse.Namespace, mix: str, seed: int, folder: str) -> dict[str, Any]:
    """The engine and stage 0 on one host, stage 1 on the other, joined by hand."""
    key = f"{folder}/pipeline.key"
    if not os.path.exists(key):
        subprocess.run(
            [sys.executable, "-m", "llm_engine", "stage", "--new-key", key], cwd=ROOT, check=True, capture_output=True
        )
    address = f"tcp://{ADDRESSES[0]}:{PORT + seed % 100}"
    command = [sys.executable, "-m", "llm_engine", "stage", "--join", address, "--index", "1", "--pipeline-key", key]
    stage = subprocess.Popen(
        inside(1, *command, "--cpus", "1", "--cpu-threads", "1"), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        turn = task(args, mix, seed, stage_cpus="0;1", remote_stages="1", pipeline_address=address, pipeline_key=key)
        (line,) = json_lines(inside(0, sys.executable, "-m", "benchmarks.pipeline_turn", turn), 300.0)
        line["stage_exit_code"] = stage.wait(30)
    finally:
        stage.kill()
        stage.wait()
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 where the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint `small`")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of the wire, each way (default: 1)")
    parser.add_argument("--delay-ms", type=float, default=0.2, help="of the wire, one way (default: 0.2)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine.describe(), "runs": []}
    result |= {"gbit": args.gbit, "delay_ms": args.delay_ms}
    with tempfile.TemporaryDirectory() as folder, hosts(1e9 * args.gbit, 1e-3 * args.delay_ms) as wires:
        result["wire"] = try_wire()
        print(f"the wire: {result['wire']}", flush=True)
        for seed in range(args.repeats):
            for mix in MIXES:
                carried = sum(wire.num_bytes for wire in wires)
                there = over_the_wire(args, mix, seed, folder)
                there["wire_bytes"] = sum(wire.num_bytes for wire in wires) - carried
                turn = task(args, mix, seed, stage_cpus="0;1")
                (here,) = json_lines([sys.executable, "-m", "benchmarks.pipeline_turn", turn], 300.0)
                print(f"{mix}: {there['seconds']:.2f} s over the wire, {here['seconds']:.2f} s here", flush=True)
                result["runs"].append({"mix": mix, "wire": there, "here": here})
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "pipeline-hosts"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = markdown(result)
    target.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return int(any(run["wire"]["tokens_digest"] != run["here"]["tokens_digest"] for run in result["runs"]))


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    rows = []
    for mix in MIXES:
        mine = [run for run in result["runs"] if run["mix"] == mix]
        if mine:
            rows.append(
                [
                    mix,
                    Spread.of([run["here"]["seconds"] for run in mine]).text(2),
                    Spread.of([run["wire"]["seconds"] for run in mine]).text(2),
                    Spread.of([run["wire"]["seconds"] / run["here"]["seconds"] for run in mine]).text(2),
                    Spread.of([run["wire"]["wire_bytes"] / 1e6 for run in mine]).text(0),
                    "yes" if all(r["wire"]["tokens_digest"] == r["here"]["tokens_digest"] for r in mine) else "NO",
                ]
            )
    header = ["mix", "local sockets, s", "over the wire, s", "ratio", "MB on the wire", "same tokens"]
    wire = result["wire"]
    return "\n\n".join(
        [
            "# Stages on two hosts",
            f"`small` in bf16, two stages on a core each, `tcp://` with CURVE between network namespaces, "
            f"{result['gbit']:g} Gbit/s and {result['delay_ms']:g} ms each way in this process; a plain TCP connection "
            f"found a round trip of {wire['round_trip_ms']:.2f} ms and {wire['gbit_s']:.2f} Gbit/s. {result['when']}, "
            f"{result['machine']['cpu']}, {result['machine']['cores']} cores.",
            markdown_table(header, rows),
        ]
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
