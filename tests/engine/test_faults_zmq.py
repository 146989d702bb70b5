"""Real stage processes that are killed, stopped, stuck, broken or talk nonsense: in a prefill, in a decode, idle.

Each time everybody gets the right tokens in the end (or the cause, where asked for), the engine says it is not ready
until the stages are back, and nothing is left behind: no process, no file, no shared memory, no block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_engine import LLM, FinishReason, RequestFailedError
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from llm_engine.engine.threads import patience
from tests.engine.engines import SECONDS, await_state, greedy, tokens_of
from tests.engine.stage_faults import MARK, await_gone, await_that, marked_processes, shared_memory
from tests.toy_model_engine import expected_tokens
from tests.toy_stages import ProcessGate, make_stage, tell_stages

pytestmark = pytest.mark.usefixtures("no_thread_left")

PROMPTS = ([1, 2, 3], [4, 5, 6, 7], list(range(20, 45)))
"""The last one takes four chunks."""
NUM_TOKENS = 12
NOTICED_SECONDS = 2.0


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Yields the mark that the test's processes carry; at the end nothing of them may be left."""
    mark, folder, before = uuid.uuid4().hex, tmp_path / "temporary", shared_memory()
    folder.mkdir()
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("GARBAGE", "")
    yield mark
    await_gone(mark)
    left = [name for name in os.listdir(folder) if not name.startswith("torchinductor_")]  # torch's own cache
    assert left == []
    assert shared_memory() <= before


class Scene:
    """An engine of two stages, of which ``victim`` is held at a moment; three requests, or none where it is idle."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, moment: str, victim: int = 0, **settings: object
    ) -> None:
        self.gate, self.victim, self.monkeypatch = ProcessGate(folder), victim, monkeypatch
        tell_stages(monkeypatch, 2, {victim: ("tests.engine.stage_faults:sick", self.gate.told[1])})
        began = time.monotonic()
        self.llm = LLM(
            model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=200, block_size=4,
            max_num_seqs=8, max_num_batched_tokens=8, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        self.start_seconds = time.monotonic() - began
        self.engine = self.llm.engine
        executor = self.engine._executor
        assert isinstance(executor, ZmqExecutor)
        self.executor = executor
        if moment == "idle":
            self.gate.open()
            assert tokens_of(self.llm.submit([9], greedy(3)).result(SECONDS)) == expected_tokens([9], 3)
            await_state(self.engine, lambda: self.engine.state.core.is_idle)
            self.futures = []
        else:
            self.futures = [self.llm.submit(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
            for _ in range({"prefill": 1, "decode": 7}[moment]):
                assert self.gate.waiting.acquire(timeout=SECONDS)
                self.gate.let_through()
            assert self.gate.waiting.acquire(timeout=SECONDS)

    @property
    def pids(self) -> list[int]:
        group = self.executor._group
        assert group is not None
        return [stage.process.pid for stage in group.stages if stage.process is not None]

    def strike(self, fault: str) -> None:
        if fault == "stuck":
            self.monkeypatch.setattr(patience, "LEAST_SECONDS", 0.5)
            self.executor.step_patience = 0.5
        else:
            os.kill(self.pids[self.victim], SIGNALS[fault])

    def await_outage(self, seconds: float = NOTICED_SECONDS) -> None:
        core = self.engine.state.core
        epoch = core.epoch
        await_that(lambda: core.epoch > epoch or not self.engine.is_ready, seconds)

    def await_return(self) -> None:
        """As long as the first start took, and two seconds."""
        self.gate.open()
        self.monkeypatch.setattr(patience, "LEAST_SECONDS", 30.0)
        self.executor.step_patience = 30.0
        await_that(lambda: self.engine.is_ready, self.start_seconds + 2.0, lambda: self.engine.unready_reason)

    def check_answers(self) -> None:
        self.futures.append(self.llm.submit([7, 7, 7], greedy(NUM_TOKENS)))
        for future, prompt in zip(self.futures, [*PROMPTS, [7, 7, 7]][-len(self.futures) :], strict=True):
            assert tokens_of(future.result(SECONDS)) == expected_tokens(prompt, NUM_TOKENS)

    def check_idle(self) -> None:
        core = self.engine.state.core
        await_state(self.engine, lambda: core.is_idle)
        core.check_integrity()
        assert core.kv.num_free_blocks == core.kv.num_usable_blocks

    def close(self) -> None:
        self.gate.close()
        self.llm.close()


@pytest.fixture
def make_scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, traces: str) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(*arguments: object, **settings: object) -> Scene:
        scenes.append(Scene(monkeypatch, tmp_path, *arguments, **settings))  # type: ignore[arg-type]
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.close()


SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "garbage": signal.SIGUSR1,
    "well-formed garbage": signal.SIGUSR1,
    "breakdown": signal.SIGUSR2,
}
CAUSES = {
    "kill": "was ended by SIGKILL",
    "stop": "is stopped",
    "stuck": "is stuck in step",
    "garbage": "sent nonsense",
    "well-formed garbage": "sent nonsense",
    "breakdown": "was told to break down",
}


def slow(*case: object) -> object:
    """They take two seconds each, and go as the other stage's do."""
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
    *[("kill", moment, victim) for moment in ("prefill", "decode", "idle") for victim in (0, 1)],
    *[("garbage", moment, victim) for moment in ("prefill", "decode", "idle") for victim in (0, 1)],
    *[("stop", moment, victim) for moment, victim in (("prefill", 0), ("decode", 1), ("idle", 0))],
    *[slow("stop", moment, victim) for moment, victim in (("prefill", 1), ("decode", 0), ("idle", 1))],
    *[("stuck", moment, 0) for moment in ("prefill", "decode")],
    *[("well-formed garbage", moment, 1) for moment in ("decode", "idle")],
    *[("breakdown", moment, 0) for moment in ("decode", "idle")],
]


@pytest.mark.parametrize(("fault", "moment", "victim"), CASES)
def test_everybody_goes_on_to_the_right_tokens(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, fault: str, moment: str, victim: int
) -> None:
    monkeypatch.setenv("GARBAGE", "well-formed" if "well-formed" in fault else "")
    scene = make_scene(moment, victim)
    old = scene.pids
    scene.strike(fault)
    scene.await_outage(NOTICED_SECONDS + (0.5 if fault == "stuck" else 0.0))
    assert scene.llm.unready_reason is not None
    assert CAUSES[fault] in scene.llm.unready_reason
    assert f"stage {victim} died" in scene.llm.unready_reason
    assert scene.llm.dead_cause is None
    scene.await_return()
    assert not set(scene.pids) & set(old)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in old), "the old ones were ended and reaped"
    scene.check_answers()
    scene.check_idle()


@pytest.mark.parametrize("fault", ["kill", "stop", "garbage", "stuck"])
def test_without_replay_everybody_who_runs_is_told_the_cause_in_time(
    make_scene: Callable[..., Scene], fault: str
) -> None:
    scene = make_scene("decode", 1, on_stage_death="fail")
    began = time.monotonic()
    scene.strike(fault)
    for future in scene.futures:
        with pytest.raises(RequestFailedError, match=f"the stages were lost: stage 1 died: .*{CAUSES[fault]}"):
            future.result(NOTICED_SECONDS + 0.5)
    assert time.monotonic() - began < NOTICED_SECONDS + (0.5 if fault == "stuck" else 0.0)
    scene.await_return()
    scene.futures = []
    scene.check_answers()
    scene.check_idle()


def test_both_stages_killed_at_once_are_one_death(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("decode")
    for pid in scene.pids:
        os.kill(pid, signal.SIGKILL)
    scene.await_outage()
    scene.await_return()
    assert scene.engine.state.num_restarts == 1
    scene.check_answers()


def test_an_answer_that_only_the_books_refuse_is_a_death(make_scene: Callable[..., Scene]) -> None:
    """As a bug of ours would look like: the executor takes the answer, which no plan in flight asked for."""
    scene = make_scene("decode")
    with scene.engine.state.changed:
        lost = scene.engine.state.core.in_flight.popleft()
        scene.engine.state.core.in_flight.appendleft(dataclasses.replace(lost, requests=[]))
    old = scene.pids
    scene.gate.open()
    await_that(lambda: scene.engine.state.num_restarts == 1, NOTICED_SECONDS)
    scene.await_return()
    assert not set(scene.pids) & set(old)
    scene.check_answers()
    scene.check_idle()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_struck_while_it_starts_again_is_another_death(
    make_scene: Callable[..., Scene], blow: signal.Signals
) -> None:
    scene = make_scene("decode")
    old = scene.pids
    os.kill(old[0], signal.SIGKILL)
    scene.await_outage()
    await_that(lambda: not set(scene.pids) & set(old), SECONDS)
    os.kill(scene.pids[1], blow)
    await_that(lambda: scene.engine.state.num_restarts == 2, NOTICED_SECONDS)
    scene.await_return()
    scene.check_answers()


def test_beyond_the_budget_the_engine_is_dead_and_its_stages_are_gone(
    make_scene: Callable[..., Scene], traces: str
) -> None:
    scene = make_scene("decode", max_stage_restarts=0)
    os.kill(scene.pids[0], signal.SIGKILL)
    for future in scene.futures:
        assert "max_stage_restarts is 0" in str(future.exception(NOTICED_SECONDS))
    assert "stage 0 died: its process was ended by SIGKILL" in str(scene.llm.dead_cause)
    await_gone(traces)


def test_closing_while_the_stages_start_again_leaves_nothing(make_scene: Callable[..., Scene], traces: str) -> None:
    scene = make_scene("decode")
    os.kill(scene.pids[1], signal.SIGKILL)
    scene.await_outage()
    scene.llm.close()
    assert all(future.done() for future in scene.futures)
    assert not marked_processes(traces)


def test_aborting_while_a_stage_is_stopped_is_answered_at_once(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("decode", 1)
    os.kill(scene.pids[1], signal.SIGSTOP)
    with scene.llm.stream([3, 3], greedy(4)) as stream:
        pass
    assert [part.outputs[0].finish_reason for part in stream] == [FinishReason.ABORT]
    scene.await_outage()
    scene.await_return()
    scene.check_answers()


def test_a_step_that_finds_no_memory_fails_its_requests_and_kills_nobody(
    monkeypatch: pytest.MonkeyPatch, traces: str
) -> None:
    tell_stages(monkeypatch, 2, {1: ("failing", 4)})
    with LLM(model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=50) as llm:
        futures = [llm.submit(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        errors = [future.exception(SECONDS) for future in futures]
        assert any(errors)
        for error, future, prompt in zip(errors, futures, PROMPTS, strict=True):
            if error is None:
                assert tokens_of(future.result()) == expected_tokens(prompt, NUM_TOKENS)
            else:
                assert isinstance(error, RequestFailedError)
                assert "stage 1: RuntimeError: the toy was told to fail" in str(error)
        again = llm.generate([list(prompt) for prompt in PROMPTS], greedy(NUM_TOKENS), use_tqdm=False)
        assert [tokens_of(output) for output in again] == [expected_tokens(p, NUM_TOKENS) for p in PROMPTS]
        assert llm.engine.state.num_restarts == 0


# -- the engine's own end

PARENT = """
import sys
from llm_engine import LLM, SamplingParams
from tests.toy_stages import make_stage
llm = LLM(model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=200, block_size=4,
          max_num_batched_tokens=8)
print("up", flush=True)
if sys.argv[1] == "idle":
    llm.generate([1, 2], SamplingParams(max_tokens=2), use_tqdm=False)
else:
    futures = [llm.submit(prompt, SamplingParams(max_tokens=12)) for prompt in ([1, 2, 3], list(range(25)))]
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["start", "prefill", "decode", "idle"])
def test_stages_do_not_outlive_an_engine_that_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, traces: str, moment: str
) -> None:
    gate = ProcessGate(tmp_path)
    tell_stages(monkeypatch, 2, {1: gate})
    if moment == "idle":
        gate.open()
    parent = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PARENT, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent, contextlib.closing(gate):
        if moment == "start":
            await_that(lambda: len(marked_processes(traces)) == 3, SECONDS)
        else:
            assert parent.stdout.readline() == "up\n"
        if moment in ("prefill", "decode"):
            for _ in range({"prefill": 1, "decode": 6}[moment]):
                assert gate.waiting.acquire(timeout=SECONDS)
                gate.let_through()
            assert gate.waiting.acquire(timeout=SECONDS)
        if moment == "idle":
            assert parent.stdout.readline() == "there\n"
        assert len(marked_processes(traces)) == 3
        parent.kill()
        await_gone(traces)


def test_an_engine_made_in_a_thread_that_ends_keeps_its_stages(monkeypatch: pytest.MonkeyPatch, traces: str) -> None:
    tell_stages(monkeypatch, 2)
    made: list[LLM] = []

    def make() -> None:
        made.append(LLM(model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=50))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(SECONDS)
    with made[0] as llm:
        assert len(marked_processes(traces)) == 2
        assert tokens_of(llm.generate([1, 2], greedy(5), use_tqdm=False)[0]) == expected_tokens([1, 2], 5)
        assert llm.engine.state.core.epoch == 0
