"""The example package, installed as a user would, in processes that find it by its entry points alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_engine.metrics.step_trace import read_trace
from tests.server.conftest import serving

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_scheduler"
LOAD = ("--requests", "200", "--rate", "8", "--lengths", "lognormal", "--input-len", "400", "--output-len", "60")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder it was installed into. Built from a copy: a build leaves things behind."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "my_scheduler")
    target = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-build-isolation", "--target", str(target), str(source),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return target


def run(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def simulate(installed: Path, folder: Path, *words: str) -> dict[str, Any]:
    ended = run(installed, "-m", "llm_engine", "simulate", *LOAD, "--json", "out.json", *words, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_its_own_test_passes_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "test_my_scheduler.py", tmp_path)
    ended = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_scheduler.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"\b8 passed", ended.stdout)


def test_it_is_listed_with_its_option(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, "-m", "llm_engine", "schedulers", cwd=tmp_path).stdout
    assert "  shortest-prompt      shortest-prompt x max-utilization x by stages\n" in listed
    assert "--scheduler-option tokens_per_second=200.0  prompt tokens that weigh as much" in listed


def test_simulated_it_answers_sooner_than_fcfs_and_an_option_makes_it_fcfs(installed: Path, tmp_path: Path) -> None:
    fcfs = simulate(installed, tmp_path)
    shortest = simulate(installed, tmp_path, "--scheduler", "shortest-prompt")
    assert shortest["ttft_s"]["p50"] < 0.6 * fcfs["ttft_s"]["p50"]
    assert shortest["ttft_s"]["mean"] < 0.75 * fcfs["ttft_s"]["mean"]
    assert simulate(installed, tmp_path, "--ordering", "shortest-prompt")["ttft_s"] == shortest["ttft_s"]
    words = ("--scheduler", "shortest-prompt", "--scheduler-option", "tokens_per_second=inf")
    assert simulate(installed, tmp_path, *words)["ttft_s"] == fcfs["ttft_s"]


def test_it_is_compared_with_the_others_by_name(installed: Path, tmp_path: Path) -> None:
    words = ("simulate", *LOAD, "--compare", "fcfs,shortest-prompt")
    ended = run(installed, "-m", "llm_engine", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "shortest-prompt" in ended.stdout


def test_what_it_does_not_take_is_refused_at_start(installed: Path, tmp_path: Path) -> None:
    words = ("serve", "--scheduler", "shortest-prompt", "--scheduler-option")
    for option, says in (
        ("tokens_per_second=0", "tokens_per_second is 0.0; allowed: above 0"),
        ("token_per_second=5", "did you mean 'tokens_per_second'"),
        ("aging_s=5", "ordering priority has this one, and is not chosen"),
    ):
        ended = run(installed, "-m", "llm_engine", *words, option, cwd=tmp_path)
        assert ended.returncode == 2
        assert says in ended.stderr
    ended = run(installed, "-m", "llm_engine", "serve", "--scheduler-option", "tokens_per_second=5", cwd=tmp_path)
    assert ended.returncode == 2
    assert "ordering shortest-prompt has this one, and is not chosen" in ended.stderr


def test_it_serves_beside_a_resource_and_a_kv_manager(installed: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    for name in ("licence_slots.py", "keep_shared.py"):
        shutil.copy(EXAMPLE.parent / name, installed)
    words = (
        "--scheduler", "shortest-prompt", "--scheduler-option", "tokens_per_second=50", "--trace", str(trace),
        "--resource", "licence_slots:LicenceSlots", "--kv-cache-manager", "keep_shared:KeepShared",
    )  # fmt: skip
    with serving(installed, *words) as server:
        question = [{"role": "user", "content": "What is 47 + 85?"}]
        answer = server.client().chat.completions.create(model="demo", messages=question, temperature=0)
        assert answer.choices[0].message.content == "47 + 85 = 132"
        assert server.stop() == 0
    assert read_trace(str(trace)).metadata.scheduler == "shortest-prompt"
