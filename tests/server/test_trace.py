"""``serve --trace``: the file is there once the server has ended, and a bad path ends it at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llm_engine.metrics.step_trace import read_trace

from .conftest import ROOT, serving


def test_a_drained_server_leaves_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with serving(tmp_path, "--trace", str(path)) as server:
        assert server.request("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 5})[0] == 200
        assert not path.exists()
        assert server.stop() == 0
    trace = read_trace(str(path))
    assert trace.metadata.model == "demo"
    assert sum(record.num_sampled for record in trace.records) >= 5


def test_a_trace_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm_engine", "serve", "--port", "0", "--trace", str(tmp_path / "no" / "trace")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "allowed: a file that can be written (No such file or directory)" in ended.stderr
