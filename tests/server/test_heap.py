"""A served engine's garbage collector does not visit what was loaded: that would stop every thread for long."""

from __future__ import annotations

from pathlib import Path

from .conftest import serving

TELLING = """
import gc, sys
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering

class Telling(FcfsOrdering):
    def add(self, request):
        print("left out", gc.get_freeze_count(), file=sys.stderr, flush=True)
        super().add(request)
"""


def test_what_was_loaded_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    with serving(tmp_path, "--ordering", "telling:Telling") as server:
        assert server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
        assert server.stop() == 0
    (told,) = [line.split() for line in server.lines if line.startswith("left out")]
    assert int(told[2]) > 100_000
