"""The transports between real threads and processes, for a moment each; and what becomes of the figures."""

from __future__ import annotations

import copy
import json
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks import transport, transport_report
from benchmarks.children import ChildError, json_lines
from benchmarks.published import put_between
from benchmarks.transports.driver import percentile
from benchmarks.transports.kinds import NEIGHBOURS, PAYLOADS, TRANSPORTS, Transport
from tests.docs.pages import ROOT

PAGE = "# A page\n\n<!-- transport: written by benchmarks.transport -->\nold\n<!-- transport: end -->\n\nafter\n"


def test_every_row_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, markdown, page = tmp_path / "t.json", tmp_path / "t.md", tmp_path / "page.md"
    page.write_text(PAGE)
    assert transport.main(["--quick", "--json", str(file), "--markdown", str(markdown), "--page", str(page)]) == 0
    result = json.loads(file.read_text())
    assert result["failures"] == []
    rows = {(run["transport"], run["payload"], run["neighbour"]): run for run in result["runs"]}
    present = set(TRANSPORTS) - set(result["missing"])
    assert {"asyncio", "zmq-ipc", "zmq-inproc", "queue", "pipe"} <= present
    assert set(rows) == {(name, payload, one) for name in present for payload in PAYLOADS for one in NEIGHBOURS}
    for run in result["runs"]:
        assert all(run[column.key] > 0 for column in transport_report.COLUMNS)
        assert run["wake_ups"] >= 1
        assert run["wake_p50_us"] <= run["wake_p99_us"]
    text = page.read_text()
    assert text.startswith("# A page\n") and text.endswith("<!-- transport: end -->\n\nafter\n") and "old" not in text
    for found in (text, markdown.read_text(), capsys.readouterr().out):
        assert "switch interval" in found
    assert markdown.read_text().count("SimpleQueue, 2 threads |") == len(PAYLOADS) * len(NEIGHBOURS)


def test_a_transport_that_is_not_installed_says_so_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    uvloop = TRANSPORTS["uvloop"]
    monkeypatch.setitem(TRANSPORTS, "uvloop", Transport(uvloop.title, True, uvloop.make, needs="no_such_module"))
    result = transport.measure_all(["uvloop"], 1, 0.01, 5.0)
    assert result["runs"] == [] and result["failures"] == []
    rows = transport_report.table(result, "idle")
    assert [row[:3] for row in rows] == [
        [uvloop.title, payload, "no_such_module is not installed"] for payload in PAYLOADS
    ]


@pytest.mark.parametrize("victim", ["measuring", "peer"])
def test_one_end_that_dies_takes_the_other_with_it(victim: str) -> None:
    words = ["pipe", "--seconds", "20", "--switch-interval", "5"]
    command = [sys.executable, "-m", "benchmarks.transports.measure", *words]
    with closing(json_lines([sys.executable, "-c", KILLER, victim, *command], 60)) as lines:
        assert next(lines) == {"both_ended": True, "code": 1 if victim == "peer" else -signal.SIGKILL}


KILLER = """
import json, os, select, signal, subprocess, sys, time
measuring = subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
deadline = time.monotonic() + 30
while not (found := open(f"/proc/{measuring.pid}/task/{measuring.pid}/children").read().split()):
    assert time.monotonic() < deadline
peer = os.pidfd_open(int(found[0]))
os.kill(measuring.pid if sys.argv[1] == "measuring" else int(found[0]), signal.SIGKILL)
ended = bool(select.select([peer], [], [], 15)[0])
print(json.dumps({"both_ended": ended, "code": measuring.wait(15)}))
"""


def test_a_measurement_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(ChildError, match=f"exit code -{signal.SIGKILL:d}"):
        list(json_lines([sys.executable, "-c", "import threading; threading.Event().wait(60)"], 0.3))
    assert time.monotonic() - began < 30


CANNED: dict[str, Any] = {
    "when": "2026-01-02 03:04",
    "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux"},
    "versions": {"python": "3.11"},
    "repeats": 2,
    "seconds": 0.2,
    "switch_interval_ms": 5.0,
    "missing": {},
    "runs": [
        {
            "transport": "queue", "repeat": repeat, "payload": "64 B", "neighbour": "idle", "load_before": 0.5,
            "other_cores": 0.05, "round_trips_per_s": 1000.0 * (repeat + 1), "messages_per_s": 50.0,
            "wake_p50_us": 10.0 + repeat, "wake_p99_us": 100.0, "wake_ups": 9,
        }
        for repeat in range(2)
    ],
    "failures": [],
}  # fmt: skip


def test_a_row_is_the_median_over_the_rounds() -> None:
    row = [
        "SimpleQueue, 2 threads",
        "64 B",
        "1,500 (1,000..2,000)",
        "50.0 (50.0..50.0)",
        "10.5 (10.0..11.0)",
        "100 (100..100)",
    ]
    assert transport_report.table(CANNED, "idle") == [row]
    assert transport_report.table(CANNED, "busy") == []
    assert "| " + " | ".join(row) + " |" in transport_report.section(CANNED)
    assert "Provisional" not in transport_report.section(CANNED)


def test_a_machine_that_was_not_quiet_and_failures_are_told() -> None:
    result = copy.deepcopy(CANNED)
    for run in result["runs"]:
        run["other_cores"] = 0.4
    result["failures"] = [{"who": "pipe", "repeat": 1, "error": "exit code 1\nmore\nBroken: pipe\n"}]
    page = transport_report.section(result)
    assert "**Provisional:**" in page
    assert "Failed: pipe, repeat 2: exit code 1: Broken: pipe" in page and "more" not in page


def test_percentiles_are_values_that_were_seen() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="none given"):
        percentile([], 0.5)


@pytest.mark.parametrize("text", ["", "no marks", PAGE + PAGE, PAGE.replace("<!-- transport: end -->", "")])
def test_a_page_without_its_marks_is_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        put_between(page, "transport", "new")
    assert page.read_text() == text
    with pytest.raises(SystemExit):
        transport.parse_args(["--page", str(page)])
    assert "once each" in capsys.readouterr().err


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    quick = transport.parse_args(["--quick"])
    assert (quick.json, quick.markdown, quick.page, quick.repeats) == (None, None, None, 1)
    part = transport.parse_args(["--transport", "queue", "pipe"])
    assert (part.transport, part.json, part.page) == (["queue", "pipe"], None, None)
    args = transport.parse_args([])
    assert args.page == ROOT / "docs" / "transport.md"
    for words in (["--repeats", "0"], ["--seconds", "0"], ["--seconds", "nan"], ["--switch-interval", "0"]):
        with pytest.raises(SystemExit):
            transport.parse_args(words)
        assert words[0] in capsys.readouterr().err
