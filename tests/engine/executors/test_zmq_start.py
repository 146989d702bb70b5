"""How stage processes start, and what becomes of a start that fails: at once, with the stage's own words, and nothing
left behind."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from llm_engine import LLM
from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import ConfigError, EngineDeadError, ModelLoadError
from llm_engine.engine.executors import zmq_group
from llm_engine.engine.executors.base import StagesUp
from llm_engine.engine.executors.inproc import InprocExecutor
from llm_engine.engine.executors.registry import ExecutorSpec, make_executor, make_zmq
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from llm_engine.workers.model_engine import ModelInfo, Progress
from llm_engine.workers.pipeline_key import new_key, write_key
from llm_engine.workers.stage_runner import StageRunner
from tests.toy_model_engine import ToyModelEngine
from tests.toy_stages import make_stage, tell_stages

from .zmq_toys import SECONDS, Endless, check_tokens, children, files_in, stage_pids, toy_executor

QUICKLY = 8.0
"""Seconds a failing start may take on a machine that does other things too; interpreters have to start."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For temporary files; the test leaves none there, and no process."""
    path, before = tmp_path / "temporary", children()
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    shared = set(os.listdir("/dev/shm"))
    yield path
    assert files_in(path) == []
    assert children() == before
    assert set(os.listdir("/dev/shm")) == shared


class Unloadable(ToyModelEngine):
    def load(self, progress: Progress | None = None) -> ModelInfo:
        if self.stage == 1:
            raise ModelLoadError("no such weight: toy.layers.7 of caf\udce9")
        return super().load(progress)


class Half(ToyModelEngine):
    """Made for something else."""

    check_device = release = None  # type: ignore[assignment]


class Fatal(ToyModelEngine):
    """Its process ends without a word."""

    def load(self, progress: Progress | None = None) -> ModelInfo:
        if self.stage == 1:
            os._exit(23)
        return super().load(progress)


class Cut(ToyModelEngine):
    """Nothing that its stage sends gets through."""

    def load(self, progress: Progress | None = None) -> ModelInfo:
        StageRunner._pass_probe = lambda self, round: None  # type: ignore[method-assign]
        return super().load(progress)


class Sized(ToyModelEngine):
    def load(self, progress: Progress | None = None) -> ModelInfo:
        info = super().load(progress)
        info.free_memory_bytes = 24 * 16 * 7 + self.stage
        return info


def test_a_stage_that_cannot_load_fails_the_start_with_its_own_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its words are no UTF-8."""
    tell_stages(monkeypatch, 2, engine_class=Unloadable)
    began = time.monotonic()
    with pytest.raises(ModelLoadError, match=r"stage 1: no such weight: toy\.layers\.7 of caf\\udce9") as caught:
        LLM(model_engine=make_stage, pipeline_parallel_size=2, executor="zmq", num_kv_blocks=50)
    assert time.monotonic() - began < QUICKLY
    told = "".join(traceback.format_exception(caught.value))
    assert "in load" in told and "test_zmq_start.py" in told and 'raise ModelLoadError("no such weight' in told


def test_what_is_no_model_engine_fails_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 2, engine_class=Half)
    with pytest.raises(ModelLoadError, match=r"Half is no model engine: no check_device, release"):
        toy_executor().start()


def test_a_stage_that_dies_while_it_loads_fails_the_start_and_ends_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_stages(monkeypatch, 2, engine_class=Fatal)
    with pytest.raises(EngineDeadError, match=r"stage 1 died: its process ended with exit code 23$"):
        toy_executor().start()


def test_stages_that_do_not_reach_one_another_fail_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_group, "PROBE_SECONDS", 0.5)
    tell_stages(monkeypatch, 2, engine_class=Cut)
    with pytest.raises(EngineDeadError, match=r"all stages are ready, but nothing came round .*in-0.*in-1"):
        toy_executor().start()


def test_a_process_that_cannot_even_start_fails_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineDeadError, match=r"exit code 1, before it joined$"):
        toy_executor().start()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        toy_executor().start()
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(ConfigError, match="executor is 'zmq'; allowed: inproc"):
        toy_executor().start()


def test_a_stage_that_fails_before_it_joins_fails_the_start_with_its_last_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError('there is no libzmq.so.5')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineDeadError) as caught:
        toy_executor().start()
    said = str(caught.value)
    assert "exit code 1, before it joined:\nTraceback" in said
    assert said.endswith("ImportError: there is no libzmq.so.5")
    assert "libzmq" not in capfd.readouterr().err, "once is enough"


def test_the_garbage_collector_of_a_stage_leaves_out_what_was_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_stages(monkeypatch, 1, {0: ("tests.engine.executors.liars:visit_little",)})
    executor = toy_executor(1)
    executor.start()
    check_tokens(executor)
    executor.shutdown()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library takes no such wishes")
def test_a_stage_keeps_the_memory_that_a_step_frees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 1, {0: ("tests.engine.executors.liars:keep",)})
    executor = toy_executor(1)
    executor.start()
    check_tokens(executor)
    executor.shutdown()


def test_what_a_stage_writes_while_it_starts_is_not_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; print('a word of warning', file=sys.stderr)")
    monkeypatch.syspath_prepend(tmp_path)
    tell_stages(monkeypatch, 1, {0: ("tests.engine.executors.liars:shout",)})
    executor = toy_executor(1)
    executor.start()
    check_tokens(executor)
    executor.shutdown()
    err = capfd.readouterr().err
    assert err.count("a word of warning") == 1
    assert err.count("forward 0") == 1


def test_what_a_stage_cannot_import_fails_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 2)
    monkeypatch.setenv("TOY_STAGES", os.environ["TOY_STAGES"].replace("toy_model_engine", "nowhere"))
    with pytest.raises(ModuleNotFoundError, match=r"stage [01]: No module named 'tests.nowhere'"):
        toy_executor().start()


def test_shutdown_from_another_thread_ends_a_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 2, engine_class=Endless)
    executor = toy_executor()
    raised: list[BaseException] = []

    def start() -> None:
        try:
            executor.start()
        except EngineDeadError as error:
            raised.append(error)

    starter = threading.Thread(target=start)
    starter.start()
    deadline = time.monotonic() + SECONDS
    while executor._group is None or not any(stage.info is not None for stage in executor._group.stages):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    executor.shutdown()
    starter.join(SECONDS)
    assert "shut down while it started" in str(raised[0])


# -- what it needs


def test_an_unwritable_folder_for_temporary_files_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"TMPDIR is '.*/file'; allowed: a folder .* that can be written to"):
        toy_executor().start()


def test_a_path_too_long_for_socket_files_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match=r"a path shorter by \d+ bytes"):
        toy_executor().start()
    assert files_in(long) == []


def test_the_longest_path_that_is_allowed_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /llm-engine-xxxxxxxx/results is 28 bytes
    path = tmp_path / ("x" * (107 - 28 - len(str(tmp_path)) - 1))
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    tell_stages(monkeypatch, 2)
    with closing(Closing(toy_executor())) as it:
        it.executor.start()
        check_tokens(it.executor)


class Closing:
    def __init__(self, executor: ZmqExecutor) -> None:
        self.executor = executor

    def close(self) -> None:
        self.executor.shutdown()


def test_an_address_in_use_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    write_key(tmp_path / "key", new_key())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        executor = toy_executor(pipeline_address=address, pipeline_key=str(tmp_path / "key"), remote_stages="1")
        with pytest.raises(ConfigError, match=f"pipeline_address is '{address}'; allowed: a free address.*in use"):
            executor.start()
    executor = toy_executor(
        pipeline_address="tcp://192.0.2.1:5555", pipeline_key=str(tmp_path / "key"), remote_stages="1"
    )
    with pytest.raises(ConfigError, match="a free address of this host"):
        executor.start()


def test_more_stages_than_layers_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 99; allowed: at most"):
        LLM(pipeline_parallel_size=99, executor="zmq")


def test_a_factory_that_stages_cannot_import_is_refused_and_auto_keeps_it_here() -> None:
    settings = {"pipeline_parallel_size": 2, "num_kv_blocks": 50}
    spec = ExecutorSpec(EngineConfig.of(**settings), lambda stage: ToyModelEngine(stage, 2), block_size=4)
    with pytest.raises(ConfigError, match=r"model_engine is .*lambda.*allowed: something a stage's process can import"):
        make_zmq(spec)
    assert isinstance(make_executor(spec), InprocExecutor)
    assert isinstance(make_executor(ExecutorSpec(spec.config, make_stage, 4)), ZmqExecutor)
    assert isinstance(make_executor(ExecutorSpec(EngineConfig.of(), make_stage, 4)), InprocExecutor)


# -- what it comes to


def test_the_pool_is_the_least_over_stages_that_share_a_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 3, engine_class=Sized)
    executor = toy_executor(3, num_kv_blocks=None, block_size=16)
    try:
        assert executor.start().num_kv_blocks == 7
    finally:
        executor.shutdown()


def test_one_progress_tells_of_all_stages_up_to_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_stages(monkeypatch, 3)
    reports: list[tuple[int, int]] = []
    executor = toy_executor(3, progress=lambda done, total: reports.append((done, total)))
    executor.start()
    executor.shutdown()
    assert reports[-1] == (300, 300)
    assert all(done <= total for done, total in reports)


def test_the_folder_is_private_while_stages_start_and_gone_when_they_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_stages(monkeypatch, 2)
    modes: list[int] = []
    executor = toy_executor(progress=lambda done, total: modes.extend(p.stat().st_mode for p in folder.iterdir()))
    executor.start()
    assert files_in(folder) == []
    assert {mode & 0o777 for mode in modes} == {0o700}
    check_tokens(executor)
    executor.shutdown()


def test_strangers_at_the_sockets_are_dropped_while_stages_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell_stages(monkeypatch, 2)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def intrude(done: int, total: int) -> None:
        if sockets:
            return
        (inside,) = folder.iterdir()
        for name, kind in (("control", zmq.DEALER), ("results", zmq.PUSH), ("in-0", zmq.PUSH)):
            stranger = context.socket(kind)
            stranger.set(zmq.IMMEDIATE, 1)
            stranger.connect(f"ipc://{inside}/{name}")
            assert stranger.poll(int(SECONDS * 1000), zmq.POLLOUT), "connected, while the folder is there"
            for frames in ([b"garbage"], [b"0123456789abcdef", b"garbage"], [b"a", b"b", b"c", b"d"]):
                stranger.send_multipart(frames)
            sockets.append(stranger)

    executor = toy_executor(progress=intrude)
    with caplog.at_level(logging.WARNING):
        executor.start()
        check_tokens(executor)
    executor.shutdown()
    context.destroy(linger=0)
    assert "a control message from a stranger was dropped" in caplog.text
    assert "a message from a stranger was dropped" in caplog.text  # at the results
    assert "stage 0: a message from a stranger was dropped" in caplog.text


def test_a_terminals_signals_are_for_the_engine_and_a_stages_log_is_the_engines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell_stages(monkeypatch, 1, {0: ("complaining",)})
    executor = toy_executor(1)
    executor.start()
    (pid,) = stage_pids(executor)
    assert os.getpgid(pid) == pid  # Ctrl-C is for the engine alone
    assert os.getsid(pid) == os.getsid(0)  # and no share of the cores of its own
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    assert int(ignored, 16) >> (signal.SIGTTOU - 1) & 1  # writing to a terminal that minds never stops it
    assert executor._group is not None
    token = executor._group._local._token.hex().encode()
    for public in ("cmdline", "environ"):
        assert token not in Path(f"/proc/{pid}/{public}").read_bytes()
    with caplog.at_level(logging.WARNING):
        check_tokens(executor)
        executor.collect(0.3)
    executor.shutdown()
    assert ("toy", logging.WARNING, "stage 0: it is hot in here") in caplog.record_tuples


@pytest.mark.parametrize(("everywhere", "ahead"), [(True, True), (False, True), (True, False)])
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_the_thread_of_an_engine_whose_every_cpu_has_a_stage_interrupts_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool, ahead: bool
) -> None:
    """A thread of the test's own, since it is the thread's. The stages that it starts again are no different."""
    tell_stages(monkeypatch, 2)
    first, *others = sorted(os.sched_getaffinity(0))
    cpus = ",".join(map(str, others)) if everywhere else str(first)
    policies: list[list[int]] = []
    for_sockets: list[list[int]] = []

    def io_thread(pid: int) -> int:
        names = {int(task.name): (task / "comm").read_text() for task in Path(f"/proc/{pid}/task").iterdir()}
        return next(thread for thread, name in names.items() if "IO" in name)

    def start() -> None:
        executor = toy_executor(stage_cpus=f"{first};{cpus}", schedule_ahead=ahead)
        try:
            executor.start()
            policies.append([os.sched_getscheduler(of) for of in (0, *stage_pids(executor))])
            for_sockets.append([os.sched_getscheduler(io_thread(pid)) for pid in stage_pids(executor)])
            executor.restart(1)
            deadline = time.monotonic() + SECONDS
            while not isinstance(executor.collect(SECONDS), StagesUp) and time.monotonic() < deadline:
                pass
            policies.append([os.sched_getscheduler(of) for of in (0, *stage_pids(executor))])
        finally:
            executor.shutdown()
        policies.append([os.sched_getscheduler(0)])

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(SECONDS)
    patient = os.SCHED_BATCH if everywhere and ahead else os.SCHED_OTHER
    assert policies == [*2 * [[patient, os.SCHED_OTHER, os.SCHED_OTHER]], [os.SCHED_OTHER]]
    assert for_sockets == [[os.SCHED_OTHER, patient]], "that of the last stage, which sends the results"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_each_stage_has_its_cpus_and_threads_before_torch_could_be_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    tell_stages(monkeypatch, 2)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    executor = toy_executor(stage_cpus=f"{second};{first},{second}", cpu_threads=3)
    executor.start()
    pids = stage_pids(executor)
    assert [os.sched_getaffinity(pid) for pid in pids] == [{second}, {first, second}]
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {b"OMP_NUM_THREADS=3", b"GOMP_SPINCOUNT=1000"} <= set(environment)
    executor.shutdown()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    executor = toy_executor(stage_cpus="none")
    executor.start()
    environment = Path(f"/proc/{stage_pids(executor)[0]}/environ").read_bytes().split(b"\0")
    assert b"OMP_NUM_THREADS=7" in environment, "a user's own choice stands"
    assert not any(line.startswith(b"GOMP_SPINCOUNT") for line in environment)
    assert os.sched_getaffinity(stage_pids(executor)[0]) == os.sched_getaffinity(0)
    executor.shutdown()
