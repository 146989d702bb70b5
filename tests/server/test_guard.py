"""The guard that all servers of these tests run under does bite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import guarded_environment


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import asyncio; asyncio.run(None)", "asked for an event loop"),
        ("import asyncio; asyncio.new_event_loop()", "asked for an event loop"),
        ("import asyncio; asyncio.get_event_loop_policy().new_event_loop(); asyncio.Runner().get_loop()", "event loop"),
        ("import os, pickle, types; pickle.loads(pickle.dumps(types.SimpleNamespace()))", "UNPICKLED"),
        ("import os, pickle, types\ndata = pickle.dumps(types.SimpleNamespace())\n"
         "child = os.fork()\nif not child: pickle.loads(data)\n"
         "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0", "UNPICKLED"),
    ],
)  # fmt: skip
def test_it_refuses(tmp_path: Path, code: str, says: str) -> None:
    environ = guarded_environment(tmp_path)
    ended = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=30)
    assert ended.returncode != 0
    assert says in ended.stderr
