"""How fast a message reaches another thread or process, and how soon a sleeping receiver runs.

    python -m benchmarks.transport

asks the question of the pipeline RFC again: an event loop or blocking threads? A repeat measures every transport once,
each in a process of its own; then comes the next repeat. The table goes to the terminal, to ``benchmarks/results`` and
into ``docs/transport.md``; of a part, only into files that are named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tqdm import tqdm

from benchmarks import machine, published, transport_report
from benchmarks.children import ChildError, json_lines
from benchmarks.transports.kinds import NEIGHBOURS, PAYLOADS, TRANSPORTS

QUICK_SECONDS = 0.02
CHILD_TIMEOUT = 60.0
"""Seconds beyond twenty times a figure's seconds, for all figures of a transport: start, drain, end."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds for one figure of a repeat (default: 0.2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--switch-interval", type=float, default=sys.getswitchinterval() * 1000, metavar="MS",
        help="how long a thread may keep the interpreter lock when another wants it (default: %(default)g ms)",
    )  # fmt: skip
    parser.add_argument(
        "--transport", nargs="+", choices=list(TRANSPORTS), default=list(TRANSPORTS), metavar="NAME",
        help=f"which (default: all): {', '.join(TRANSPORTS)}",
    )  # fmt: skip
    published.add_arguments(parser, "transport", "transport.md")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be 1 or more")
    if not 0 < args.seconds <= 60:
        parser.error(f"--seconds {args.seconds:g}: must be above 0 and at most 60")
    if not 0.001 <= args.switch_interval <= 1000:
        parser.error(f"--switch-interval {args.switch_interval:g}: must be from 0.001 to 1000")
    if args.quick:
        args.repeats, args.seconds = 1, QUICK_SECONDS
    whole = set(args.transport) == set(TRANSPORTS)
    published.settle_arguments(parser, args, "transport", "transport.md", whole=whole)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 if a transport failed."""
    args = parse_args(argv)
    result = measure_all(args.transport, args.repeats, args.seconds, args.switch_interval)
    for error in result["failures"]:
        print(f"{error['who']} failed, repeat {error['repeat'] + 1}: {error['error']}", file=sys.stderr)
    if not result["runs"]:
        return 1
    transport_report.show(result)
    published.publish(args, "transport", result, "Transports", transport_report.section(result))
    return 1 if result["failures"] else 0


def measure_all(names: Sequence[str], repeats: int, seconds: float, switch_interval: float) -> dict[str, Any]:
    """Every transport once per repeat, forwards and backwards in turn. ``switch_interval`` in milliseconds."""
    result = published.begin(repeats, versions())
    result |= {
        "seconds": seconds,
        "switch_interval_ms": switch_interval,
        "missing": {name: why for name in names if (why := TRANSPORTS[name].missing)},
    }
    present = [name for name in names if name not in result["missing"]]
    total = repeats * len(present) * len(PAYLOADS) * len(NEIGHBOURS)
    with tqdm(total=total, desc="Transports", unit="row", dynamic_ncols=True) as bar:
        for repeat in range(repeats):
            for name in present if repeat % 2 == 0 else reversed(present):
                measure(name, repeat, result, bar)
    return result


def measure(name: str, repeat: int, result: dict[str, Any], bar: tqdm[Any]) -> None:
    """One transport's turn; its rows, or its failure, go into the result."""
    seconds = result["seconds"]
    command = [sys.executable, "-m", "benchmarks.transports.measure", name, "--seconds", str(seconds)]
    command += ["--switch-interval", str(result["switch_interval_ms"])]
    load, others = os.getloadavg()[0], machine.OtherWork()
    lines = []
    try:
        with closing(json_lines(command, CHILD_TIMEOUT + 20 * seconds)) as found:
            for line in found:
                lines.append(line)
                bar.set_postfix_str(f"{name}, {line['payload']}, {line['neighbour']} neighbour", refresh=False)
                bar.update()
    except ChildError as error:
        result["failures"].append({"who": name, "repeat": repeat, "error": str(error)})
    about = {"transport": name, "repeat": repeat, "load_before": load, "other_cores": others.cores()}
    result["runs"] += [{**about, **line} for line in lines]


def versions() -> dict[str, str]:
    """Of what carries the messages."""
    import zmq

    found = {"pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
    with suppress(PackageNotFoundError):
        found["uvloop"] = version("uvloop")
    return found


if __name__ == "__main__":
    sys.exit(main())
