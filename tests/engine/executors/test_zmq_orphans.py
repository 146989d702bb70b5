"""A stage that can do nothing for its own end is ended by the system when its engine is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llm_engine.workers.model_engine import ModelInfo, Progress
from tests.toy_model_engine import ToyModelEngine
from tests.toy_stages import tell_stages

from .zmq_toys import SECONDS, files_in

ENGINE = """
import json, sys
from tests.engine.executors.zmq_toys import stage_pids, toy_executor
from tests.plans import Planner
executor = toy_executor()
executor.start()
planner = Planner()
planner.add([1, 2, 3])
executor.push(planner.plan({1: 3}))
print(json.dumps(stage_pids(executor)), flush=True)
executor.collect(60)
"""


def hold_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 holds its interpreter lock for good: its side thread never runs again."""
    tell_stages(monkeypatch, 2, {1: ("tests.engine.executors.liars:hold",)})


@pytest.mark.parametrize("how", ["holds the interpreter lock", "is stopped"])
def test_it_does_not_outlive_an_engine_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    if how == "is stopped":
        tell_stages(monkeypatch, 2)
    else:
        hold_the_interpreter(monkeypatch)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE, env=environment) as engine:
        assert engine.stdout is not None
        stages = [psutil.Process(pid) for pid in json.loads(engine.stdout.readline())]
        if how == "is stopped":
            os.kill(stages[1].pid, signal.SIGSTOP)
        else:
            while stages[1].num_ctx_switches() != (before := stages[1].num_ctx_switches()):
                time.sleep(0.7)  # longer than a heartbeat: nothing of it runs any more
                if stages[1].num_ctx_switches() == before:
                    break
        assert all(stage.is_running() for stage in stages)
        engine.kill()
    _, alive = psutil.wait_procs(stages, timeout=SECONDS)
    assert not alive
    assert files_in(folder) == []


class Loading(ToyModelEngine):
    """Stage 1 says which process it is, and loads for ever."""

    def load(self, progress: Progress | None = None) -> ModelInfo:
        if self.stage == 1:
            Path(os.environ["LOADING"]).write_text(str(os.getpid()))
            signal.pause()
        return super().load(progress)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_nothing_is_left_of_a_start_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("LOADING", str(tmp_path / "pid"))
    tell_stages(monkeypatch, 2, engine_class=Loading)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    deadline = time.monotonic() + SECONDS
    with subprocess.Popen([sys.executable, "-c", ENGINE], env=environment) as engine:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = psutil.Process(engine.pid).children()
        assert len(started) == 3, "two stages, and who removes the folder"
        (loading,) = [process for process in started if process.pid == int((tmp_path / "pid").read_text())]
        if is_stopped:
            loading.suspend()
        assert files_in(folder)
        engine.kill()
    _, alive = psutil.wait_procs(started, timeout=SECONDS)
    assert not alive
    assert files_in(folder) == []
