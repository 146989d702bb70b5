"""What the engine makes of what it hears of a stage; no process but one that sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from typing import cast

import pytest

from llm_engine.core.errors import CapacityError, ConfigError, EngineDeadError, ModelLoadError
from llm_engine.engine.executors.zmq_process import StageProcess
from llm_engine.engine.executors.zmq_stage import ClockOffset, StageRecord, combined_progress, error_of
from llm_engine.workers.control import ClockPong, Failed, Heartbeat
from llm_engine.workers.control_link import failure_of

SERVING = {"serving": True, "patience": 30.0}
LOADING = {"serving": False, "patience": 30.0}


class Sleeper(StageProcess):
    """A process that does nothing, looked at as a stage's is."""

    def __init__(self) -> None:
        self.index = 0
        self.ended = False
        self._popen = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], stdin=subprocess.PIPE)
        assert self._popen.stdin is not None
        self._stdin = self._popen.stdin
        self._pidfd = self._first_words = None
        self._last_words = ""


@pytest.fixture
def sleeper() -> Iterator[StageProcess]:
    process = Sleeper()
    yield process
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10)


def record(process: StageProcess | None = None, **more: object) -> StageRecord:
    return StageRecord(0, 100.0, process, identity=b"x", **more)  # type: ignore[arg-type]


def test_a_local_stage_that_is_silent_but_runs_gets_ten_seconds(sleeper: StageProcess) -> None:
    assert record(sleeper).ailment(109.9, **SERVING) is None  # type: ignore[arg-type]
    assert record(sleeper).ailment(110.1, **SERVING) == "nothing was heard of its process for 10.1 s"  # type: ignore[arg-type]


def test_a_stopped_process_is_found_at_once(sleeper: StageProcess) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not sleeper.is_stopped:
        assert time.monotonic() < deadline
    for moment in (SERVING, LOADING):
        assert record(sleeper).ailment(101.4, **moment) is None  # type: ignore[arg-type]
        assert "is stopped" in str(record(sleeper).ailment(101.6, **moment))  # type: ignore[arg-type]
    os.kill(sleeper.pid, signal.SIGCONT)


def test_loading_may_be_silent_for_a_minute(sleeper: StageProcess) -> None:
    for process in (sleeper, None):
        assert record(process).ailment(159.0, **LOADING) is None  # type: ignore[arg-type]
        assert "for 61.0 s" in str(record(process).ailment(161.0, **LOADING))  # type: ignore[arg-type]


def test_a_remote_stage_that_is_silent_is_given_up_before_two_seconds_are_over() -> None:
    assert record().ailment(101.7, **SERVING) is None  # type: ignore[arg-type]
    assert "for 1.8 s" in str(record().ailment(101.8, **SERVING))  # type: ignore[arg-type]


def test_a_remote_stage_is_waited_for_before_it_has_joined() -> None:
    stage = StageRecord(0, 100.0)
    assert stage.ailment(690.0, **LOADING) is None  # type: ignore[arg-type]
    assert stage.ailment(701.0, **LOADING) is not None  # type: ignore[arg-type]


def test_a_step_may_take_as_long_as_patience_lasts() -> None:
    stage = record(beat=Heartbeat(7, 29.0))
    assert stage.ailment(100.5, **SERVING) is None  # type: ignore[arg-type]
    assert stage.ailment(101.5, **SERVING) == "it is stuck in step 7 for 30.5 s"  # type: ignore[arg-type]
    assert stage.ailment(101.5, serving=True, patience=100.0) is None
    assert record(beat=Heartbeat(None, 0.0)).ailment(101.5, serving=True, patience=0.1) is None


def test_progress_is_summed_over_the_stages_and_grows_to_the_whole() -> None:
    stages = [record(), record(), record()]
    assert combined_progress(stages) is None
    stages[1].progress = (10, 100)
    assert combined_progress(stages) == (10, 300)
    stages[0].progress, stages[2].progress = (50, 50), (60, 60)
    assert combined_progress(stages) == (120, 210)
    stages[1].progress = (100, 100)
    assert combined_progress(stages) == (210, 210)


def test_the_quickest_round_trip_tells_the_clock() -> None:
    clock = ClockOffset()
    assert clock.seconds == 0.0
    for there, back in ((0.3, 0.001), (0.001, 0.001), (0.002, 0.2)):  # the stage's clock is 50 s ahead
        clock.observe(ClockPong(10.0, 60.0 + there), 10.0 + there + back)
    assert clock.seconds == pytest.approx(50.0, abs=1e-9)
    for _ in range(16):  # what is long past counts no more: clocks drift
        clock.observe(ClockPong(10.0, 61.01), 10.02)
    assert clock.seconds == pytest.approx(51.0)


@pytest.mark.parametrize("kind", [ModelLoadError, CapacityError, MemoryError, ValueError])
def test_a_stages_error_is_raised_as_its_own_type_with_its_own_traceback(kind: type[Exception]) -> None:
    try:
        raise kind("no such weight")
    except kind as error:
        failed = failure_of(error)
    raised = error_of(2, failed)
    assert type(raised) is kind
    assert str(raised) == "stage 2: no such weight"
    assert 'raise kind("no such weight")' in "".join(traceback.format_exception(raised))


def test_a_setting_that_a_stage_refuses_keeps_its_parts() -> None:
    raised = error_of(1, failure_of(ConfigError("dtype", "float16", "float32")))
    assert str(raised) == "stage 1: dtype is 'float16'; allowed: float32"
    caught = cast(ConfigError, raised)
    assert (caught.field, caught.value, caught.allowed) == ("dtype", "float16", "float32")


@pytest.mark.parametrize("kind", ["SystemExit", "UnicodeDecodeError", "OutOfMemoryError", "Any", "print", "no name"])
def test_types_that_are_not_ours_become_one_of_ours(kind: str) -> None:
    raised = error_of(0, Failed(kind, "what happened", "Traceback ..."))
    assert type(raised) is EngineDeadError
    assert str(raised) == "stage 0: what happened"
