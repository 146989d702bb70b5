"""This engine, through its own command: ``llm-engine bench offline``, a fresh process per workload."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import claim_stdout, parse_args, use_threads, write_line
from benchmarks.workloads import warm_up_seed


def main() -> None:
    """Speak the protocol in the command's name."""
    args = parse_args()
    out = claim_stdout()
    use_threads(args.threads)
    for workload in args.workload:
        report = bench(args, workload)
        # Two runs with consecutive seeds: the first one warms up, as it does for everyone else.
        write_line(out, args, workload, report["runs"][-1], report["peak_rss_mb"], report["versions"])


def bench(args: argparse.Namespace, workload: str) -> dict[str, Any]:
    """The report of one call of the command."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "llm_engine", "bench", "offline"]
        flags = {
            "--model": args.model,
            "--workload": workload,
            "--repeat": 2,
            "--seed": warm_up_seed(args.seed),
            "--json": file,
            "--cpu-threads": args.threads,
            "--kv-cache-memory": args.kv_gib << 30,
            "--device": "cpu",
            "--dtype": "bfloat16",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        subprocess.run(command + words, check=True, stdin=subprocess.DEVNULL, env=dict(os.environ))
        report: dict[str, Any] = json.loads(file.read_text())
        return report


if __name__ == "__main__":
    main()
