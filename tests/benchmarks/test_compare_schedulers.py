"""The tables of docs/schedulers.md have a row for everything that is compared, and come out of the benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import compare_schedulers
from llm_engine.core.config import SchedulerConfig
from llm_engine.simulation.entries import parse_entries
from llm_engine.simulation.workloads import WORKLOADS

PAGE = (Path(__file__).parents[2] / "docs" / "schedulers.md").read_text(encoding="utf-8")


def test_every_shipped_workload_is_compared() -> None:
    assert set(compare_schedulers.CELLS) == set(WORKLOADS)


@pytest.mark.parametrize("workload", compare_schedulers.CELLS)
def test_the_page_has_a_row_for_each_scheduler(workload: str) -> None:
    found = re.search(rf"\*\*{workload}\*\*.*?\n\n(\|.*?)\n\n", PAGE, re.DOTALL)
    assert found is not None
    rows = [line.split("|")[1].strip() for line in found[1].splitlines()[2:]]
    assert rows == list(parse_entries(compare_schedulers.CELLS[workload], SchedulerConfig()))


def test_a_table_has_a_row_for_each_scheduler_and_no_column_without_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_schedulers, "CELLS", {"shared-prefix": "fcfs,longest-prefix"})
    ((workload, table),) = compare_schedulers.tables()
    header, _, *rows = table.splitlines()
    assert workload == "shared-prefix"
    assert [row.split("|")[1].strip() for row in rows] == ["fcfs", "longest-prefix"]
    assert "cache hits" in header
    assert "Jain" not in header
