"""Stage processes against one stage, schedulers against each other, chunks in a row against one at a time, and how
long a stage waits for the host.

    python -m benchmarks.pipeline --small DIR --tiny DIR

Every row runs in a process of its own, all rows of a group in turn, then the next repeat with other prompts. Ratios are
made per repeat, between runs that lie seconds apart. The tables go to the terminal and to ``benchmarks/results``, with
``--timelines`` pictures too. Host overhead is what ``llm-engine trace`` calls so, its median and its 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.children import ROOT, ChildError, json_lines
from benchmarks.pipeline_turn import TIMELINE_S
from benchmarks.report import Spread, markdown_table

UNLIMITED = 1 << 20
HOST = ("host overhead p50, µs", "p99, µs")
DRAWN = {"schedulers-small": ("greedy", "balanced")}
"""Rows of a group whose timelines are drawn; each is ``pipeline-ROW.png``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contender of a group: the engine with these settings."""

    name: str
    settings: dict[str, Any]
    cores: list[int] | None = None
    """The engine's own threads are pinned here; anywhere when absent."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are compared on one model and one mix; the first row is what the others are measured against."""

    name: str
    model: str
    mix: str
    question: str
    rows: list[Row] = field(default_factory=list)


def one_stage(**settings: Any) -> dict[str, Any]:
    """A stage process of its own on core 0."""
    return {"executor": "zmq", "stage_cpus": "0", "cpu_threads": 1, **settings}


def two_stages(**settings: Any) -> dict[str, Any]:
    """A stage process on each core."""
    return {
        "executor": "zmq",
        "pipeline_parallel_size": 2,
        "stage_cpus": "0;1",
        "cpu_threads": 1,
        "scheduler": "balanced",
        **settings,
    }


def groups(num_layers: dict[str, int]) -> list[Group]:
    """What is asked."""
    made = []
    for mix in ("decode", "prefill"):
        layers = num_layers["small"]
        given = {f"{first},{layers - first}": first for first in (layers // 2, layers // 2 + 1, layers // 2 + 2)}
        made.append(
            Group(
                f"stages-{mix}", "small", mix, "two stages on a core each against one stage on one core",
                [
                    Row("1 stage, 1 core", one_stage()),
                    Row("1 stage, everything on 1 core", one_stage(), cores=[0]),
                    Row("2 stages, automatic split", two_stages()),
                    *(Row(f"2 stages, {text}", two_stages(pipeline_layer_partition=text)) for text in given),
                    Row("1 stage, 2 threads", one_stage(stage_cpus="0-1", cpu_threads=2)),
                    Row("4 stages", two_stages(pipeline_parallel_size=4, stage_cpus="0;1;0;1")),
                ],
            )
        )  # fmt: skip
    for model in ("tiny", "small"):
        wide = {"max_num_batched_tokens": UNLIMITED, "schedule_ahead": False}
        made.append(
            Group(
                f"schedulers-{model}", model, "many",
                "the same two stages and load, a budget that lets one micro-batch swallow everything",
                [
                    Row("greedy", two_stages(scheduler="greedy", **wide)),
                    Row("balanced", two_stages(scheduler="balanced", **wide)),
                    Row("balanced, ahead", two_stages(scheduler="balanced", max_num_batched_tokens=UNLIMITED)),
                ],
            )
        )  # fmt: skip
    chunk = {"max_num_batched_tokens": 256, "enable_prefix_caching": False}
    made.append(
        Group(
            "prompt", "small", "prompt", "time to first token of one 2048-token prompt, 256-token chunks",
            [
                Row("one chunk at a time", two_stages(num_queues=1, schedule_ahead=False, scheduler="greedy", **chunk)),
                Row("chunks in a row", two_stages(scheduler="greedy", **chunk)),
                Row("balanced", two_stages(**chunk)),
            ],
        )
    )  # fmt: skip
    for model in ("tiny", "small"):
        ahead = {f"{'' if on else 'not '}ahead": {"schedule_ahead": on} for on in (True, False)}
        made.append(
            Group(
                f"host-{model}", model, "host", "64 requests at once, 16 tokens in and 96 out",
                [
                    *(Row(f"1 stage, {name}", one_stage(**given)) for name, given in ahead.items()),
                    *(Row(f"2 stages, {name}", two_stages(**given)) for name, given in ahead.items()),
                ],
            )
        )  # fmt: skip
    return made


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--small", type=Path, required=True, help="folder of the checkpoint `small`")
    parser.add_argument("--tiny", type=Path, required=True, help="folder of the checkpoint `tiny`")
    parser.add_argument("--group", nargs="+", help="only these groups")
    parser.add_argument("--row", nargs="+", help="only these rows; a group's first one is always there")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--traces", type=Path, help="folder for a step trace of each row's last repeat")
    parser.add_argument(
        "--timelines", action="store_true", help="draw two seconds of greedy and of balanced, beside the results"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one row (default: 300)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    args = parser.parse_args(argv)
    if args.timelines and find_spec("matplotlib") is None:
        parser.error("--timelines: needs matplotlib")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 if a row failed."""
    args = parse_args(argv)
    folders = {"small": args.small.resolve(), "tiny": args.tiny.resolve()}
    num_layers = {
        name: json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        for name, folder in folders.items()
    }
    asked = [group for group in groups(num_layers) if not args.group or group.name in args.group]
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "repeats": args.repeats,
        "groups": [{"name": g.name, "model": g.model, "mix": g.mix, "question": g.question} for g in asked],
        "runs": [],
        "timelines": {},
        "failures": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for group in asked:
        for repeat in range(args.repeats):
            for row in [row for row in group.rows if not args.row or row is group.rows[0] or row.name in args.row]:
                _turn(args, group, row, repeat, folders[group.model], result)
    target = args.out / "pipeline"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = markdown(result)
    target.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return 1 if result["failures"] else 0


def _turn(args: argparse.Namespace, group: Group, row: Row, repeat: int, folder: Path, result: dict[str, Any]) -> None:
    settings = {"model": str(folder), "dtype": "bfloat16", "kv_cache_memory": 1 << 30, **row.settings}
    task: dict[str, Any] = {"name": row.name, "mix": group.mix, "seed": repeat, "settings": settings}
    if row.cores:
        task["cores"] = row.cores
    last = repeat == args.repeats - 1
    picture = f"pipeline-{row.name}.png" if args.timelines and last and row.name in DRAWN.get(group.name, ()) else None
    if picture:
        task["timeline"] = str(args.out.resolve() / picture)
    if args.traces and last:
        args.traces.mkdir(parents=True, exist_ok=True)
        task["trace"] = str(
            args.traces.resolve() / f"{group.name}-{row.name.replace(', ', '-').replace(' ', '-')}.json"
        )
    others = machine.OtherWork()
    try:
        command = [sys.executable, "-m", "benchmarks.pipeline_turn", json.dumps(task)]
        lines = list(json_lines(command, args.timeout))
    except ChildError as error:
        result["failures"].append({"group": group.name, "row": row.name, "repeat": repeat, "error": str(error)[-2000:]})
        print(f"{group.name}, {row.name} failed: {error}", file=sys.stderr, flush=True)
        return
    if picture:
        result["timelines"].setdefault(group.name, {})[row.name] = picture
    for line in lines:
        result["runs"].append({"group": group.name, "other_cores": others.cores(), **line})
        print(
            f"[{repeat + 1}/{args.repeats}] {group.name}, {row.name}: {line['seconds']:.2f} s, first token "
            f"{line['ttft_s']:.3f} s, busy {_shares(line['stage_busy'])}, {line['num_steps']} steps",
            flush=True,
        )


def _shares(busy: list[float | None]) -> str:
    return " ".join("-" if share is None else f"{share:.2f}" for share in busy)


def least(busy: list[float | None]) -> float | None:
    """The least busy stage's share; ``None`` where there is nothing between fill and drain."""
    return min((share for share in busy if share is not None), default=None)


def markdown(result: dict[str, Any]) -> str:
    """The page: a table per group."""
    device = result["machine"]
    others = Spread.of([run["other_cores"] for run in result["runs"]])
    parts = [
        "# Pipelines",
        f"bf16, {result['repeats']} repeats in turn, {result['when']}. {device['cpu']}, {device['cores']} cores, "
        f"{device['memory_gib']:.0f} GiB, {device['system']}. Cores that other processes kept busy meanwhile: "
        f"{others.text(2)}.",
    ]
    for group in result["groups"]:
        key = "ttft_s" if group["mix"] == "prompt" else "seconds"
        runs = [run for run in result["runs"] if run["group"] == group["name"]]
        names = list(dict.fromkeys(run["name"] for run in runs))
        if not names:
            continue
        base = {run["seed"]: run[key] for run in runs if run["name"] == names[0]}
        rows = []
        for name in names:
            mine = [run for run in runs if run["name"] == name]
            speedup = [base[run["seed"]] / run[key] for run in mine if run["seed"] in base]
            busy = [share for run in mine if (share := least(run["stage_busy"])) is not None]
            host = [run["host_overhead_us"] for run in mine if run["host_overhead_us"]]
            rows.append(
                [
                    name,
                    Spread.of([run[key] for run in mine]).text(3),
                    Spread.of(speedup).text(2) if speedup else "-",
                    Spread.of(busy).text(2) if busy else "-",
                    *(Spread.of(values).text(0) for values in zip(*host, strict=True)),
                    *([] if host else ["-", "-"]),
                ]
            )
        title = "first token, s" if key == "ttft_s" else "seconds"
        header = [group["name"], title, f"times faster than {names[0]}", "least busy stage", *HOST]
        parts += [f"`{group['model']}`, {group['question']}:", markdown_table(header, rows)]
        parts += [
            f"{TIMELINE_S:g} seconds of `{name}`, from the middle of its last repeat:\n\n![{name}]({picture})"
            for name, picture in result.get("timelines", {}).get(group["name"], {}).items()
        ]
    parts += [f"Failed: {f['group']}, {f['row']}: {f['error'].splitlines()[0]}" for f in result["failures"]]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
