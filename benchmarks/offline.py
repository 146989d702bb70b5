"""The offline workloads on this engine and its peers, in turn, in one session.

    python -m benchmarks.offline --model DIR --peer vllm=PYTHON --peer openvino=PYTHON

A repeat runs every contender once, each in a process of its own with its own Python; then comes the next repeat with
other prompts. The table goes to the terminal, JSON and Markdown to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.children import ROOT, ChildError, json_lines
from benchmarks.workloads import WORKLOADS

PEERS = {"vllm": "vllm_cpu", "openvino": "openvino_genai", "transformers": "transformers_static"}
BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """A name for the table, a Python, and the script under ``benchmarks/peers``."""

    name: str
    python: str
    script: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint from benchmarks.make_models")
    parser.add_argument(
        "--peer", type=_peer, action="append", default=[], metavar="NAME=PYTHON",
        help=f"measure a peer too, with the Python of its environment; NAME is one of {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--engine", default=sys.executable, metavar="PYTHON", help="Python that runs the engine")
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=sorted(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads for each (default: 2)")
    parser.add_argument("--kv-gib", type=int, default=1, help="GiB for each one's KV cache (default: 1)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one contender's turn (default: 900)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder for converted checkpoints (default: llm-engine-benchmarks in the user's cache)",
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be 1 or more")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there")
    if args.cache is None:
        args.cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llm-engine-benchmarks"
    return args


def _peer(text: str) -> Contender:
    name, _, python = text.partition("=")
    if name not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON with a NAME of {', '.join(PEERS)}")
    return Contender(name, python, PEERS[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 if a contender failed."""
    args = parse_args(argv)
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "model": describe_model(args.model),
        "threads": args.threads,
        "repeats": args.repeats,
        "kv_gib": args.kv_gib,
        "runs": [],
        "failures": [],
    }
    contenders = [Contender(report.ENGINE, args.engine, "llm_engine_cli"), *args.peer]
    for repeat in range(args.repeats):
        for contender in contenders:
            measure(args, contender, repeat, result)
    if not result["runs"]:
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"offline-{result['model']['name']}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
    report.show(result)
    print(f"written: {target}.json, {target}.md")
    return 1 if result["failures"] else 0


def measure(args: argparse.Namespace, contender: Contender, repeat: int, result: dict[str, Any]) -> None:
    """One contender's turn; its runs, or its failure, go into the result."""
    load = os.getloadavg()[0]
    others = machine.OtherWork()
    lines: list[dict[str, Any]] = []
    try:
        for line in turn(args, contender, repeat):
            lines.append(line)
            print(f"[{repeat + 1}/{args.repeats}] {contender.name} {line['workload']}: {_in_words(line)}", flush=True)
    except ChildError as error:
        result["failures"].append({"contender": contender.name, "repeat": repeat, "error": str(error).split("\n")[0]})
        print(f"{contender.name} failed: {error}", file=sys.stderr, flush=True)
    about = {"contender": contender.name, "repeat": repeat, "load_before": load, "other_cores": others.cores()}
    result["runs"] += [{**about, **line} for line in lines]


def _in_words(line: dict[str, Any]) -> str:
    return (
        f"{line['total_s']:.2f} s, {line['output_throughput']:.0f} tok/s, "
        f"first token {line['ttft_ms']:.1f} ms, inter-token {line['itl_ms']:.2f} ms"
    )


def turn(args: argparse.Namespace, contender: Contender, repeat: int) -> Iterator[dict[str, Any]]:
    """Run the contender's script on all workloads; yields its lines as they come. Raises ``ChildError``."""
    command = [contender.python, "-m", f"benchmarks.peers.{contender.script}"]
    command += ["--model", str(args.model.resolve()), "--workload", *args.workload, "--seed", str(repeat)]
    command += ["--threads", str(args.threads), "--kv-gib", str(args.kv_gib), "--cache", str(args.cache.resolve())]
    return json_lines(command, args.timeout)


def describe_model(folder: Path) -> dict[str, Any]:
    """The checkpoint's name, and what its weights and its KV cache take."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        "name": folder.resolve().name,
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "kv_bytes_per_token": 2 * config["num_hidden_layers"] * kv_heads * head_dim * BF16_BYTES,
    }


if __name__ == "__main__":
    sys.exit(main())
