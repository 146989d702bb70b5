"""The trace's benchmark on the bundled model, for a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import trace_cost


def test_the_cost_of_a_record_is_held_against_a_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace_cost, "ROUNDS", 2)
    monkeypatch.setattr(trace_cost, "OUTPUT", 6)
    target = tmp_path / "cost.json"
    assert trace_cost.main(["--rows", "1", "5", "--json", str(target)]) == 0
    rows, printed = json.loads(target.read_text())["rows"], capsys.readouterr().out
    assert [row["decodes"] for row in rows] == [1, 5]
    for row in rows:
        assert 0 < row["record_s"] < row["step_s"]
        assert row["share"] == row["record_s"] / row["step_s"]
        assert f"{1e6 * row['record_s']:.1f}" in printed
