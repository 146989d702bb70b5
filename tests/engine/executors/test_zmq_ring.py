"""How the first stage gets its tokens where all stages are processes of this host."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from llm_engine.core.step import StepPlan, StepResult
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from llm_engine.workers.control_link import GRACE_SECONDS
from tests.plans import Planner
from tests.toy_model_engine import expected_tokens
from tests.toy_stages import ProcessGate, tell_stages

from .zmq_toys import SECONDS, stage_pids, toy_executor


def ring_ends_of(pid: int) -> int:
    sockets = psutil.Process(pid).net_connections("unix")
    return sum(one.type == socket.SOCK_SEQPACKET for one in sockets)


def run(executor: ZmqExecutor, planner: Planner, plan: StepPlan) -> None:
    executor.push(plan)
    result = executor.collect(SECONDS)
    assert isinstance(result, StepResult), result
    planner.enter(plan, result)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        pytest.param({}, [1, 0, 1], id="ring"),
        pytest.param({"num_queues": 100_000}, [0, 0, 0], id="no-room"),
        pytest.param({"schedule_ahead": False}, [0, 0, 0], id="not-ahead"),
    ],
)
def test_the_first_and_the_last_stage_inherit_a_ring_where_it_has_room(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], ends: list[int]
) -> None:
    """Without one the tokens come over the sockets. Before them come more prompts than the ring has room for, and no
    plan goes on from their tokens: they are taken all the same."""
    tell_stages(monkeypatch, 3)
    executor = toy_executor(3, **settings)
    here = ring_ends_of(os.getpid())
    try:
        ahead = executor.start().feeds_back
        assert [ring_ends_of(pid) for pid in stage_pids(executor)] == ends
        assert ring_ends_of(os.getpid()) == here
        planner = Planner()
        for turn in range(500):
            request = planner.add([3, 1, 4, turn % 97])
            run(executor, planner, planner.plan({request.request_id: 4}))
            if turn < 499:
                planner.finish(request)
        made_ahead = planner.step - 1 if ahead else None
        run(executor, planner, planner.plan({request.request_id: 1}, feeds_from=made_ahead))
        assert request.outputs == expected_tokens([3, 1, 4, 499 % 97], 2)
    finally:
        executor.shutdown()


@pytest.mark.parametrize("holds_a_plan", [False, True])
def test_a_first_stage_that_waits_ends_at_once_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, holds_a_plan: bool
) -> None:
    """For the next plan, or for the tokens that a plan goes on from: by itself, not since its time to end ran out."""
    gate = ProcessGate(tmp_path)
    tell_stages(monkeypatch, 2, {-1: gate})
    executor = toy_executor(2)
    try:
        executor.start()
        if holds_a_plan:
            planner = Planner()
            request = planner.add([3, 1, 4])
            executor.push(planner.plan({request.request_id: 3}))
            executor.push(planner.plan({request.request_id: 1}, feeds_from=0))
            assert gate.waiting.acquire(timeout=SECONDS), "the last stage has not sampled the first token"
        assert executor._group is not None
        process = executor._group.stages[0].process
        assert process is not None
        began = time.monotonic()
        process.ask_to_end()
        assert process.wait(SECONDS)
        assert (process.exit_code, time.monotonic() - began < GRACE_SECONDS) == (0, True)
    finally:
        gate.close()
        executor.shutdown()
