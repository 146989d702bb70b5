"""What the executor itself does when a stage is lost: the others go too, and all come back for another epoch."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from llm_engine.core.step import StepResult
from llm_engine.engine.executors import zmq_executor
from llm_engine.engine.executors.base import StageDied, StagesUp, Wake
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from llm_engine.engine.executors.zmq_process import StageProcess
from tests.plans import Planner
from tests.toy_stages import ProcessGate, tell_stages

from .zmq_toys import SECONDS, Endless, check_tokens, children, files_in, stage_pids, toy_executor

NOTICED_SECONDS = 2.0


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ZmqExecutor]]:
    """Starts an executor of two stages; nothing of it may be left in the end."""
    folder, before, made = tmp_path / "temporary", children(), []
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def start(hooks: dict[int, Any] | None = None, num_stages: int = 2) -> ZmqExecutor:
        tell_stages(monkeypatch, num_stages, hooks)
        made.append(toy_executor(num_stages))
        made[-1].start()
        return made[-1]

    yield start
    for executor in made:
        executor.shutdown()
    assert children() == before
    assert files_in(folder) == []


def death_of(executor: ZmqExecutor) -> StageDied:
    died = executor.collect(SECONDS)
    assert isinstance(died, StageDied), died
    return died


def test_a_lost_stage_takes_the_others_along_and_all_come_back_anew(start: Callable[..., ZmqExecutor]) -> None:
    executor = start(num_stages=3)
    for epoch in range(2):
        check_tokens(executor, epoch)
        old = stage_pids(executor)
        began = time.monotonic()
        os.kill(old[epoch], signal.SIGKILL)
        assert death_of(executor) == StageDied(epoch, "its process was ended by SIGKILL")
        assert time.monotonic() - began < 1.0
        assert executor.collect(0.05) is None, "told once"
        assert executor.can_restart
        executor.restart(epoch + 1)
        assert executor.collect(SECONDS) == StagesUp(epoch + 1)
        assert not set(stage_pids(executor)) & set(old)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in old)
    check_tokens(executor, 2)


def test_stages_come_back_with_the_pool_that_the_books_know(monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 2, free_memory_bytes=24 * 4 * 40)
    executor = toy_executor(num_kv_blocks=None)
    try:
        assert executor.start().num_kv_blocks == 40
        tell_stages(monkeypatch, 2, free_memory_bytes=24 * 4 * 20)  # what is free has shrunk since
        os.kill(stage_pids(executor)[0], signal.SIGKILL)
        death_of(executor)
        executor.restart(1)
        assert executor.collect(SECONDS) == StagesUp(1)
        assert executor._group is not None and executor._group.info is not None
        assert executor._group.info.num_kv_blocks == 40
        check_tokens(executor, 1)
    finally:
        executor.shutdown()


def test_nothing_of_an_earlier_epoch_is_executed_or_reported(start: Callable[..., ZmqExecutor], tmp_path: Path) -> None:
    gate = ProcessGate(tmp_path)
    executor = start({1: gate})
    planner = Planner()
    planner.add([1, 2, 3, 4])
    for _ in range(2):
        executor.push(planner.plan({1: 1}))
    assert gate.waiting.acquire(timeout=SECONDS)
    os.kill(stage_pids(executor)[0], signal.SIGKILL)
    death_of(executor)
    executor.push(planner.plan({1: 1}))
    executor.restart(1)
    executor.push(planner.plan({1: 1}))
    gate.open()
    assert executor.collect(SECONDS) == StagesUp(1)
    executor.push(planner.plan({}))
    check_tokens(executor, 1)
    assert executor.collect(0.05) is None
    gate.close()


def test_collect_reports_wakes_while_stages_are_away(start: Callable[..., ZmqExecutor]) -> None:
    executor = start()
    os.kill(stage_pids(executor)[1], signal.SIGKILL)
    death_of(executor)
    executor.wake()
    assert executor.collect(SECONDS) == Wake()
    assert executor.collect(0.05) is None
    executor.restart(1)
    executor.wake()
    began = time.monotonic()
    assert executor.collect(SECONDS) == Wake()
    assert time.monotonic() - began < 0.3, "it does not wait for the stages"
    assert executor.collect(SECONDS) == StagesUp(1)


def test_a_stage_lost_while_all_come_back_is_another_death(start: Callable[..., ZmqExecutor]) -> None:
    executor = start()
    old = stage_pids(executor)
    os.kill(old[1], signal.SIGKILL)
    death_of(executor)
    executor.restart(1)
    while set(stage_pids(executor)) & set(old):
        assert executor.collect(0.01) is None
    os.kill(stage_pids(executor)[0], signal.SIGKILL)
    assert death_of(executor).stage == 0
    executor.restart(2)
    assert executor.collect(SECONDS) == StagesUp(2)
    check_tokens(executor, 2)


def test_stages_that_cannot_be_started_again_are_another_death(
    start: Callable[..., ZmqExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = start()
    os.kill(stage_pids(executor)[1], signal.SIGKILL)
    death_of(executor)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
        executor.restart(1)
        died = death_of(executor)
    assert "could not be started again: TMPDIR is" in died.cause
    assert executor.collect(0.05) is None
    executor.restart(2)
    assert executor.collect(SECONDS) == StagesUp(2)
    check_tokens(executor, 2)


def test_without_a_socket_left_nothing_is_left_of_a_start_either(start: Callable[..., ZmqExecutor]) -> None:
    executor = start()
    before = children()
    os.kill(stage_pids(executor)[1], signal.SIGKILL)
    death_of(executor)
    context, taken = executor._context, list[zmq.Socket[bytes]]()
    assert context is not None
    with contextlib.suppress(zmq.ZMQError):
        while True:
            taken.append(context.socket(zmq.PUSH))
    executor.restart(1)
    died = death_of(executor)
    assert "could not be started again: Too many open files" in died.cause
    assert not children() - before, "the remover of its socket files"
    assert os.listdir(tempfile.gettempdir()) == []
    for socket in taken:
        socket.close(0)
    executor.restart(2)
    assert executor.collect(SECONDS) == StagesUp(2)
    check_tokens(executor, 2)


def test_a_stage_that_loads_without_end_when_it_comes_back_is_another_death(
    start: Callable[..., ZmqExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took far less the first time."""
    monkeypatch.setattr(zmq_executor, "_LOAD_SECONDS", 0.5)
    executor = start()
    group = executor._group
    assert group is not None and group.load_seconds is not None
    limit = max(0.5, 10 * group.load_seconds)
    tell_stages(monkeypatch, 2, engine_class=Endless)
    os.kill(stage_pids(executor)[1], signal.SIGKILL)
    death_of(executor)
    executor.restart(1)
    died = death_of(executor)
    assert died.stage == 0 and f"its start took over {limit:.0f} s" in died.cause
    tell_stages(monkeypatch, 2)
    executor.restart(2)
    assert executor.collect(SECONDS) == StagesUp(2)
    check_tokens(executor, 2)


def test_an_old_process_that_does_not_end_is_not_waited_for_without_an_end(
    start: Callable[..., ZmqExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = start()
    with monkeypatch.context() as patch:
        patch.setattr(zmq_executor, "_SHUTDOWN_SECONDS", 0.5)
        patch.setattr(StageProcess, "kill", lambda self: None)  # as in the middle of a system call that hangs
        os.kill(stage_pids(executor)[1], signal.SIGSTOP)
        death_of(executor)
        executor.restart(1)
        assert "do not end" in death_of(executor).cause
    executor.restart(2)
    assert executor.collect(SECONDS) == StagesUp(2)
    check_tokens(executor, 2)


def test_a_step_that_takes_longer_than_patience_lasts_is_given_up(
    start: Callable[..., ZmqExecutor], tmp_path: Path
) -> None:
    gate = ProcessGate(tmp_path)
    executor = start({0: gate})
    planner = Planner()
    planner.add([1, 2, 3, 4])
    executor.push(planner.plan({1: 4}))
    assert gate.waiting.acquire(timeout=SECONDS)
    assert executor.collect(1.2) is None, "patience is long unless it is set"
    executor.step_patience = 1.0
    died = death_of(executor)
    assert died.stage == 0 and "it is stuck in step 0 for" in died.cause
    gate.close()


@pytest.mark.parametrize(
    ("hook", "stage", "says"),
    [
        ("noise", 0, "stage 0 sent nonsense to stage 1"),
        ("noise", 1, "stage 1 sent nonsense"),
        ("wrong_step", 1, "where 0/0 is due"),
        ("wrong_tokens", 1, "tokens from 1000000"),
        ("no_times", 1, "computed from 0.0 to nan"),
        ("endless_times", 1, "computed from 0.0 to inf"),
        ("times_between", 0, "computed from 2.0 to 1.0"),
        ("skip", 0, "PLAN 1 follows -1"),
        ("no_hidden", 0, "bytes for a hidden state"),
        ("too_wide", 0, "a hidden state [4, 2] of 4 tokens, 1 wide"),
    ],
)
def test_nonsense_is_blamed_on_who_sent_it(start: Callable[..., ZmqExecutor], hook: str, stage: int, says: str) -> None:
    executor = start({stage: ("tests.engine.executors.liars:lie", hook)})
    planner = Planner()
    planner.add([1, 2, 3, 4])
    executor.push(planner.plan({1: 4}))
    executor.push(planner.plan({}))
    died = death_of(executor)
    assert died.stage == stage and says in died.cause
    executor.restart(1)
    assert executor.collect(SECONDS) == StagesUp(1)


def test_text_that_is_no_utf8_kills_nobody(start: Callable[..., ZmqExecutor], caplog: pytest.LogCaptureFixture) -> None:
    executor = start(dict.fromkeys((0, 1), ("tests.engine.executors.liars:mumble",)))
    planner = Planner()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            executor.push(planner.plan({}))
            result = executor.collect(SECONDS)
            assert isinstance(result, StepResult) and "cannot read caf\\udce9" in str(result.error)
        assert executor.collect(0.3) is None
    assert ("toy", logging.WARNING, "stage 0: cannot read caf\\udce9") in caplog.record_tuples


def test_a_step_that_gets_lost_is_noticed(start: Callable[..., ZmqExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_engine.engine.executors.zmq_group.LOST_SECONDS", 1.0)
    executor = start({0: ("tests.engine.executors.liars:lie", "swallow")})
    planner = Planner()
    planner.add([1, 2, 3, 4])
    executor.push(planner.plan({1: 4}))
    assert "step 0 got lost between the stages" in death_of(executor).cause


def test_a_starved_engine_does_not_take_its_own_absence_for_the_stages(start: Callable[..., ZmqExecutor]) -> None:
    """Its thread was away for longer than any stage may be silent; what happens from then on is noticed as ever."""
    executor = start()
    group = executor._group
    assert group is not None
    group._looked_at -= 100.0
    for stage in group.stages[:1]:
        stage.heard_at -= 100.0  # the other one was heard of in passing
    assert executor.collect(0.6) is None
    assert max(group._moved_at, *(stage.heard_at for stage in group.stages)) <= time.monotonic()
    check_tokens(executor)
    began = time.monotonic()
    os.kill(stage_pids(executor)[0], signal.SIGSTOP)
    assert "is stopped" in death_of(executor).cause
    assert time.monotonic() - began < NOTICED_SECONDS


def test_stages_are_watched_while_there_is_always_another_result(
    start: Callable[..., ZmqExecutor], tmp_path: Path
) -> None:
    """The output thread is the bottleneck: beside its work it hears them, and finds one that is stopped."""
    gate = ProcessGate(tmp_path)
    gate.open()
    executor = start({1: gate})
    group = executor._group
    assert group is not None
    planner = Planner()
    for _ in range(200):
        executor.push(planner.plan({}))
    for _ in range(200):
        assert gate.waiting.acquire(timeout=SECONDS)
    heard = group.stages[0].heard_at
    began = time.monotonic()
    os.kill(stage_pids(executor)[1], signal.SIGSTOP)
    while isinstance(collected := executor.collect(SECONDS), StepResult):
        time.sleep(0.02)  # what is made of it
    assert isinstance(collected, StageDied) and collected.stage == 1 and "is stopped" in collected.cause
    assert time.monotonic() - began < NOTICED_SECONDS
    assert group.stages[0].heard_at > heard
    gate.close()


def test_waking_is_harmless_at_any_time(start: Callable[..., ZmqExecutor]) -> None:
    executor = start()
    executor.shutdown()
    executor.wake()
    executor.push(Planner().plan({}))
    assert executor.collect(0.0) == Wake()
    executor.shutdown()


def test_collect_before_the_start_and_after_the_end_waits_for_a_wake() -> None:
    executor = toy_executor()
    for _ in range(2):
        began = time.monotonic()
        assert executor.collect(0.05) is None
        assert time.monotonic() - began >= 0.04
        executor.wake()
        assert executor.collect(None) == Wake()
        executor.shutdown()
        assert executor.collect(0.0) == Wake(), "shutdown wakes whoever collects"
