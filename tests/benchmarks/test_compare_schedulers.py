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


def published(workload: str) -> list[str]:
    """The lines of the page's table."""
    found = re.search(rf"\*\*{workload}\*\*.*?\n\n(\|.*?)\n\n", PAGE, re.DOTALL)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.parametrize("workload", compare_schedulers.CELLS)
def test_the_page_has_a_row_for_each_scheduler(workload: str) -> None:
    rows = [line.split("|")[1].strip() for line in published(workload)[2:]]
    assert rows == list(parse_entries(compare_schedulers.CELLS[workload], SchedulerConfig()))


def test_the_cheapest_table_of_the_page_is_what_the_benchmark_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_schedulers, "CELLS", {"shared-prefix": compare_schedulers.CELLS["shared-prefix"]})
    ((workload, table),) = compare_schedulers.tables()
    assert workload == "shared-prefix"
    assert table.splitlines() == published("shared-prefix")
    header = table.splitlines()[0]
    assert "cache hits" in header
    assert "Jain" not in header  # a column without a figure is left out
