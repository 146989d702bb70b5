"""Start-up that does not come to its end: it leaves nothing running, and soon."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import llm_engine.engine.engine as engine_module
from llm_engine import LLM
from llm_engine.core.errors import ModelLoadError
from llm_engine.engine.executors.base import ExecutorInfo
from llm_engine.metrics.step_trace import read_trace
from llm_engine.workers.model_engine import ModelInfo, Progress
from tests.toy_model_engine import ToyModelEngine
from tests.toy_stages import make_stage, tell_stages

from .engines import SECONDS, await_true, greedy
from .executors.zmq_toys import Endless, children
from .mortal import MortalExecutor

QUICKLY = 8.0
"""Seconds that an end may take on a machine that does other things too."""


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads, processes = set(threading.enumerate()), children()
    yield
    await_true(lambda: not set(threading.enumerate()) - threads)
    assert not children() - processes


class Announced(Endless):
    """Makes a file when it begins to load."""

    def __init__(self, stage: int, num_stages: int, *, file: str, **settings: Any) -> None:
        super().__init__(stage, num_stages, **settings)
        self._file = Path(file)

    def load(self, progress: Progress | None = None) -> ModelInfo:
        if self.stage == 0:
            self._file.touch()
        return super().load(progress)


def test_ctrl_c_while_stage_processes_load_ends_them_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    tell_stages(monkeypatch, 2, engine_class=Announced, file=str(loads))
    interrupted: list[float] = []

    def ctrl_c() -> None:
        await_true(loads.exists)
        interrupted.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    hand = threading.Thread(target=ctrl_c)
    hand.start()
    with pytest.raises(KeyboardInterrupt):
        LLM(model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=50, block_size=4)
    assert time.monotonic() - interrupted[0] < QUICKLY
    hand.join(SECONDS)


def test_an_interrupted_start_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, interrupted = threading.Event(), threading.Event()

    class SlowToLoad(ToyModelEngine):
        def load(self, progress: Progress | None = None) -> ModelInfo:
            loading.set()
            assert interrupted.wait(SECONDS)
            return super().load(progress)

    def ctrl_c(self: Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return of_a_future(self, timeout)
        assert loading.wait(SECONDS)
        interrupted.set()
        raise KeyboardInterrupt

    of_a_future = Future.result
    monkeypatch.setattr(Future, "result", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        LLM(model_engine=lambda stage: SlowToLoad(stage, 1), num_kv_blocks=50, block_size=4)


class Stubborn(MortalExecutor):
    """Ends its stages, and complains."""

    def shutdown(self) -> None:
        super().shutdown()
        raise OSError("no word to the stages")


class Hopeless(Stubborn):
    def start(self) -> ExecutorInfo:
        super().start()
        raise ModelLoadError("no weights")


def toy(stage: int) -> ToyModelEngine:
    return ToyModelEngine(stage, 1)


def test_an_executor_that_neither_starts_nor_ends_fails_the_start(caplog: pytest.LogCaptureFixture) -> None:
    raised: list[BaseException] = []

    def start() -> None:
        try:
            LLM(model_engine=toy, executor=f"{__name__}:Hopeless", num_kv_blocks=50)
        except ModelLoadError as error:
            raised.append(error)

    starter = threading.Thread(target=start, daemon=True)
    starter.start()
    starter.join(SECONDS)
    assert [str(error) for error in raised] == ["no weights"]
    assert "the executor failed to shut down" in caplog.text
    assert "no word to the stages" in caplog.text


def test_an_executor_that_does_not_end_keeps_nothing_else_from_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = tmp_path / "trace.json"
    with LLM(model_engine=toy, executor=f"{__name__}:Stubborn", num_kv_blocks=50, trace=str(trace)) as llm:
        llm.generate([1, 2], greedy(3), use_tqdm=False)
    assert len(read_trace(str(trace)).records) == 3
    assert "no word to the stages" in caplog.text


@pytest.mark.parametrize("executor", ["inproc", "zmq"])
@pytest.mark.parametrize("name", ["output", "scheduling"])
def test_a_thread_that_cannot_be_started_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, executor: str, name: str
) -> None:
    def start(self: threading.Thread) -> None:
        if self.name.startswith("llm-engine-") and self.name.endswith(f"-{name}"):
            raise RuntimeError("can't start new thread")
        of_a_thread(self)

    of_a_thread = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    check_nothing_comes_of_it(monkeypatch, executor, "can't start new thread")


@pytest.mark.parametrize("executor", ["inproc", "zmq"])
def test_an_error_once_the_stages_are_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    def describe_run(*_: Any) -> None:
        raise RuntimeError("no words for it")

    monkeypatch.setattr(engine_module, "describe_run", describe_run)
    check_nothing_comes_of_it(monkeypatch, executor, "no words for it")


def check_nothing_comes_of_it(monkeypatch: pytest.MonkeyPatch, executor: str, error: str) -> None:
    registry = CollectorRegistry()
    tell_stages(monkeypatch, 1)
    with pytest.raises(RuntimeError, match=error):
        LLM(
            model_engine=toy if executor == "inproc" else make_stage, executor=executor, num_kv_blocks=50,
            registry=registry,
        )  # fmt: skip
    assert [sample for family in registry.collect() for sample in family.samples] == []
