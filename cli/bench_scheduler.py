"""``llm-engine bench scheduler``: what a step costs the host, in microseconds of schedule and update."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

from ..core.config import SchedulerConfig
from ..core.errors import ConfigError
from ..core.version import __version__
from ..metrics.step_trace import check_writable
from ..schedulers.registry import PRESETS, default_preset, find_scheduler
from .scheduler_cost import MIXES, PARTS, WARM_UP_STEPS, WATCHED_STEPS, HostLoad, NoSuchLoad, measure
from .scheduler_peer import VllmPeer
from .tables import new_table

RUNNING = (16, 256, 1024, 4096)
WAITING = (0, 1000, 10_000)
WIDTH = 190
"""Columns of the table; a narrower terminal wraps its lines."""


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    if args.json is not None:
        check_writable(args.json, "json")
    report = measure_all(
        distinct_presets() if args.scheduler is None else _names("scheduler", args.scheduler),
        RUNNING if args.running is None else _counts("running", args.running),
        WAITING if args.waiting is None else _counts("waiting", args.waiting),
        MIXES if args.mix is None else _names("mix", args.mix),
        steps=args.steps,
        rounds=args.rounds,
        vllm=args.vllm,
    )
    _print(report)
    if args.json is not None:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return 0


def measure_all(
    schedulers: Sequence[str],
    running: Sequence[int],
    waiting: Sequence[int],
    mixes: Sequence[str],
    *,
    steps: int = 20,
    rounds: int = 5,
    vllm: str | None = None,
) -> dict[str, Any]:
    """The report: its rows, and what was left out. Raises ``ConfigError`` before anything is measured."""
    waiting = sorted(waiting)
    for scheduler in schedulers:
        find_scheduler(SchedulerConfig(scheduler=scheduler))
    for mix in mixes:
        if mix not in MIXES:
            raise ConfigError("mix", mix, " or ".join(MIXES))
    for name, value, least in (
        ("steps", steps, 1), ("rounds", rounds, 1), ("running", min(running), 4), ("waiting", min(waiting), 0),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(name, value, f"whole numbers of {least} or more")
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    versions = {"llm-engine": __version__, "python": platform.python_version()}
    total = len(schedulers) * len(running) * len(mixes) * len(waiting) * rounds
    steps_each = len(waiting) * (WARM_UP_STEPS + WATCHED_STEPS + steps * rounds)
    with VllmPeer(vllm) if vllm is not None else nullcontext() as peer, _progress(total) as on_round:
        if peer is not None:
            versions["vllm"] = peer.versions["vllm"]
        for scheduler, count, mix in product(schedulers, running, mixes):
            beside = peer if scheduler == schedulers[0] else None
            on_round(f"{scheduler}, {count} running, {mix}", 0)
            done = 0
            try:
                load = HostLoad(scheduler, count, mix, steps=steps_each)
                if beside is not None:
                    beside.make(load)
                for number in waiting:
                    rows.append(measure(load, number, steps, rounds, beside, lambda: on_round("", 1)))
                    done += rounds
            except NoSuchLoad as error:
                left_out.append({"scheduler": scheduler, "running": count, "mix": mix, "why": str(error)})
                on_round("", len(waiting) * rounds - done)
    return {"rows": rows, "left_out": left_out, "steps": steps, "rounds": rounds, "versions": versions}


def distinct_presets() -> list[str]:
    """Presets that are not another one's parts under a second name, with one stage."""
    seen: dict[tuple[str, ...], str] = {}
    for name, (ordering, capacity, micro_batch) in PRESETS.items():
        seen.setdefault((ordering, capacity, micro_batch or default_preset(1)), name)
    return list(seen.values())


def _names(setting: str, text: str) -> list[str]:
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise ConfigError(setting, text, "one or more, with commas between them")
    return names


def _counts(name: str, text: str) -> list[int]:
    parts = _names(name, text)
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise ConfigError(name, text, "whole numbers with commas between them") from error


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal. What it yields takes what is being measured, and how many rounds are done."""
    if not sys.stderr.isatty():
        yield lambda what, rounds: None
        return
    from tqdm import tqdm

    with tqdm(desc="Host cost", total=total, unit="round", dynamic_ncols=True, leave=False) as bar:

        def on_round(what: str, rounds: int) -> None:
            if what:
                bar.set_postfix_str(what, refresh=False)
            bar.update(rounds)

        yield on_round


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    rows, console = report["rows"], Console(highlight=False)
    console.width = max(console.width, WIDTH)
    beside = any("vllm" in row for row in rows)
    columns = ["scheduler", "running", "waiting", "mix", "p50", "p99", "best", "schedule", "update", *PARTS]
    if beside:
        columns += ["vLLM p50", "vLLM / ours"]
    table = new_table(*columns, caption="microseconds a step; shares of it", caption_justify="left")
    for row in rows:
        cells = [row["scheduler"], str(row["running"]), str(row["waiting"]), row["mix"]]
        cells += [f"{row[key]:,.0f}" for key in ("p50_us", "p99_us", "best_us", "schedule_us", "update_us")]
        parts = row["parts_us"]
        cells += [f"{100 * parts[part] / sum(parts.values()):.0f} %" for part in PARTS]
        if beside:
            cells += in_words(row.get("vllm"))
        table.add_row(*cells)
    console.print(table)
    for one in report["left_out"]:
        console.print(f"{one['scheduler']}, {one['running']} running, {one['mix']}: no such load, {one['why']}")


def in_words(peer: dict[str, Any] | None) -> list[str]:
    """Cells: vLLM's p50, and how many times ours it is, the median of the rounds and their range."""
    if peer is None:
        return ["", ""]
    ratios = peer["ratios"]
    return [f"{peer['p50_us']:,.0f}", f"{statistics.median(ratios):.1f} ({min(ratios):.1f}..{max(ratios):.1f})"]
