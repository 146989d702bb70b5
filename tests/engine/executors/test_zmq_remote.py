"""Stages that are started by hand and join over tcp, with ``llm-engine stage`` as anybody would call it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import EngineDeadError, ModelLoadError
from llm_engine.core.step import StepResult
from llm_engine.core.version import __version__
from llm_engine.engine.executors.base import StageDied, StagesUp
from llm_engine.engine.executors.registry import ExecutorSpec, make_zmq
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from llm_engine.workers.control import (
    ClockPing,
    Failed,
    Hello,
    Message,
    Ready,
    Refused,
    Setup,
    Stop,
    decode_to_stage,
    encode,
)
from llm_engine.workers.fingerprint import fingerprint
from llm_engine.workers.pipeline_key import new_key, read_key, write_key
from llm_engine.workers.wire import WIRE_VERSION, WireError
from tests.plans import Planner
from tests.toy_model_engine import expected_tokens
from tests.toy_stages import make_stage, tell_stages

from .zmq_toys import SECONDS, check_tokens, children, files_in, stage_pids, toy_executor


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Hosts:
    """An address, a key, and stages that were started by hand; what they write is kept."""

    def __init__(self, folder: Path) -> None:
        self.key = folder / "key"
        write_key(self.key, new_key())
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"pipeline_address": self.address, "pipeline_key": str(self.key)}

    def join(self, index: int, *more: str, key: Path | None = None) -> subprocess.Popen[str]:
        log = open(self.folder / f"stage-{len(self.started)}.log", "w", encoding="utf-8")  # noqa: SIM115
        command = [sys.executable, "-m", "llm_engine", "stage", "--join", self.address, "--index", str(index)]
        with log:
            process = subprocess.Popen(
                [*command, "--pipeline-key", str(key or self.key), *more],
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self.started.append(process)
        return process

    def log_of(self, process: subprocess.Popen[str]) -> str:
        return (self.folder / f"stage-{self.started.index(process)}.log").read_text(encoding="utf-8")

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
            process.wait(SECONDS)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    folder, before = tmp_path / "temporary", children()
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    made = Hosts(tmp_path)
    yield made
    made.close()
    deadline = time.monotonic() + SECONDS
    while children() != before:
        assert time.monotonic() < deadline, "a stage outlived whoever had started it"
        time.sleep(0.01)
    assert files_in(folder) == []


@contextmanager
def starting(executor: ZmqExecutor) -> Iterator[Future[Any]]:
    """In a thread that lives on, as stages need it."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(executor.start)
        finally:
            executor.shutdown()


def stage_of(joined: subprocess.Popen[str]) -> psutil.Process:
    """The process that a hand-started command runs its stage in."""
    (stage,) = psutil.Process(joined.pid).children()
    return stage


Pair = tuple[ZmqExecutor, subprocess.Popen[str]]


@pytest.fixture
def pair(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Two stages that serve; the second one has joined by hand."""
    tell_stages(monkeypatch, 2)
    joined = hosts.join(1)
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    try:
        executor.start()
        yield executor, joined
    finally:
        executor.shutdown()


@pytest.mark.parametrize("remote", ["1", "0,2", "0,1,2"])
def test_stages_join_over_tcp_wherever_they_stand_in_the_pipeline(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, remote: str
) -> None:
    tell_stages(monkeypatch, 3)
    joined = [hosts.join(int(index)) for index in remote.split(",")]
    executor = toy_executor(3, remote_stages=remote, **hosts.settings)
    try:
        info = executor.start()
        assert info.num_stages == 3 and info.model.num_layers == 3
        before = time.monotonic()
        for result in check_tokens(executor):
            times = [moment for span in result.busy for moment in span]
            assert before - 0.01 < min(times) and max(times) < time.monotonic() + 0.01
    finally:
        executor.shutdown()
    for process in joined:
        assert process.wait(SECONDS) == 0
        assert "the engine has ended" in hosts.log_of(process)


@pytest.mark.parametrize("remote", ["0", "2"])
def test_tokens_are_fed_back_from_host_to_host(hosts: Hosts, monkeypatch: pytest.MonkeyPatch, remote: str) -> None:
    """Plans made ahead carry no tokens: the first stage goes on from those that the last one feeds it over tcp."""
    tell_stages(monkeypatch, 3)
    hosts.join(int(remote))
    executor = toy_executor(3, remote_stages=remote, **hosts.settings)
    try:
        assert executor.start().feeds_back
        planner = Planner()
        requests = [planner.add([3, 1, 4, 1, 5]), planner.add([2, 7])]
        plans = [planner.plan({1: 5}), planner.plan({2: 2})]
        for turn in range(10):
            plans.append(planner.plan({1 + turn % 2: 1}, feeds_from=plans[-2].step))
        for plan in plans:
            executor.push(plan)
        for plan in plans:
            result = executor.collect(SECONDS)
            assert isinstance(result, StepResult), result
            planner.enter(plan, result)
        for request in requests:
            assert request.outputs == expected_tokens(request.tokens[: request.num_prompt_tokens], 6)
    finally:
        executor.shutdown()


def test_a_stage_that_was_lost_joins_again_by_itself(hosts: Hosts, pair: Pair) -> None:
    executor, joined = pair
    check_tokens(executor)
    began = time.monotonic()
    stage_of(joined).kill()
    died = executor.collect(SECONDS)
    assert isinstance(died, StageDied) and died.stage == 1 and "nothing was heard of it" in died.cause
    assert time.monotonic() - began < 2.5
    executor.restart(1)
    assert executor.collect(SECONDS) == StagesUp(1)
    check_tokens(executor, 1)
    os.kill(stage_pids(executor)[0], signal.SIGKILL)  # the local one: the remote one starts anew as well
    died = executor.collect(SECONDS)
    assert isinstance(died, StageDied) and died.stage == 0
    executor.restart(2)
    assert executor.collect(SECONDS) == StagesUp(2)
    check_tokens(executor, 2)
    assert joined.poll() is None
    assert "joining again" in hosts.log_of(joined)
    executor.shutdown()
    assert joined.wait(SECONDS) == 0


@pytest.mark.parametrize("when", ["at once", "while they start again", "after they failed to"])
def test_a_stage_that_an_outage_has_sent_away_is_told_that_the_engine_ends(
    hosts: Hosts, pair: Pair, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Else it would wait for ever for an engine that is no more."""
    executor, joined = pair
    os.kill(stage_pids(executor)[0], signal.SIGKILL)
    assert isinstance(executor.collect(SECONDS), StageDied)
    if when == "while they start again":
        executor.restart(1)
        assert executor.collect(0.05) is None
    elif when == "after they failed to":
        monkeypatch.setattr(sys, "executable", "/bin/false")
        executor.restart(1)
        assert isinstance(executor.collect(SECONDS), StageDied)
    executor.shutdown()
    assert joined.wait(SECONDS) == 0
    assert "the engine has ended" in hosts.log_of(joined)


def test_an_engine_that_ends_waits_for_no_stage_without_an_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, joined = pair
    joined.kill()
    assert isinstance(executor.collect(SECONDS), StageDied)
    began = time.monotonic()
    monkeypatch.setattr("llm_engine.engine.executors.zmq_executor._FAREWELL_SECONDS", 0.5)
    executor.shutdown()
    assert 0.5 < time.monotonic() - began < 3.0


def test_a_stage_hears_of_an_engine_that_always_has_another_result(hosts: Hosts, pair: Pair) -> None:
    """For longer than an engine may be silent."""
    executor, joined = pair
    planner = Planner()
    plans = [planner.plan({}) for _ in range(200)]
    for plan in plans:
        executor.push(plan)
    for _ in plans:
        assert isinstance(executor.collect(SECONDS), StepResult)
        time.sleep(0.02)  # what is made of it
    assert executor.collect(0.5) is None
    check_tokens(executor)
    executor.shutdown()
    assert joined.wait(SECONDS) == 0
    assert "nothing was heard of the engine" not in hosts.log_of(joined)


def test_a_stage_that_breaks_while_it_serves_joins_again_too(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """What broke it may have been another one's nonsense."""
    tell_stages(monkeypatch, 2, {0: ("tests.engine.executors.liars:lie", "noise")})
    joined = hosts.join(1)
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    try:
        executor.start()
        planner = Planner()
        planner.add([1, 2, 3, 4])
        executor.push(planner.plan({1: 4}))
        died = executor.collect(SECONDS)
        assert isinstance(died, StageDied) and "stage 0 sent nonsense to stage 1" in died.cause
        tell_stages(monkeypatch, 2)
        executor.restart(1)
        assert executor.collect(SECONDS) == StagesUp(1)
        check_tokens(executor, 1)
    finally:
        executor.shutdown()
    assert joined.wait(SECONDS) == 0


def test_another_key_is_refused_on_both_sides_within_seconds(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell_stages(monkeypatch, 2)
    write_key(tmp_path / "other", new_key())
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    with caplog.at_level(logging.ERROR), starting(executor) as start:
        wrong = hosts.join(1, key=tmp_path / "other")
        assert wrong.wait(SECONDS) == 1
        assert "does not accept this pipeline key" in hosts.log_of(wrong)
        right = hosts.join(1)
        start.result(SECONDS)  # a stranger does not keep the right one out
        check_tokens(executor)
    assert "not let in" in caplog.text and "not with this pipeline key" in caplog.text
    assert right.wait(SECONDS) == 0


def test_strangers_at_the_door_are_not_let_in(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell_stages(monkeypatch, 2)
    hosts.join(1)
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    executor.start()
    host, _, port = hosts.address.removeprefix("tcp://").rpartition(":")
    with (
        zmq.Context() as context,
        context.socket(zmq.DEALER) as plain,
        socket.create_connection((host, int(port))) as raw,
        caplog.at_level(logging.ERROR),
    ):
        plain.linger = 0
        plain.connect(hosts.address)
        plain.send_multipart([b"0" * 16, b"hello"])
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10)
        for _ in range(3):
            check_tokens(executor)
            assert executor.collect(0.3) is None
    assert "not let in" in caplog.text
    executor.shutdown()


def test_a_stage_that_the_engine_does_not_wait_for_is_refused(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell_stages(monkeypatch, 2)
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    with caplog.at_level(logging.ERROR), starting(executor) as start:
        for index, says in ((0, "stage 0 is not among the engine's remote_stages"), (7, "there is no stage 7")):
            refused = hosts.join(index)
            assert refused.wait(SECONDS) == 1
            assert says in hosts.log_of(refused) and says in caplog.text
        hosts.join(1)
        start.result(SECONDS)


class Impostor:
    """Has the key and speaks the control protocol by hand, as a stage of another version, or with a bug, would."""

    def __init__(self, hosts: Hosts) -> None:
        self.key = read_key(hosts.key)
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.key.secure(self.socket, server=False)
        self.socket.connect(hosts.address)

    def say(self, message: Message | bytes) -> None:
        self.socket.send_multipart([self.key.token, message if isinstance(message, bytes) else encode(message)])

    def hear(self) -> Message:
        while self.socket.poll(SECONDS * 1000):
            message = decode_to_stage(self.socket.recv())
            if not isinstance(message, ClockPing):
                return message
        raise TimeoutError

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def awaited(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Impostor, Future[Any]]]:
    """An engine waits for stage 1; what its start comes to, and an impostor who may take the stage's place."""
    tell_stages(monkeypatch, 2)
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    impostor = Impostor(hosts)
    with starting(executor) as start:
        yield impostor, start
    impostor.close()


HELLO = Hello(WIRE_VERSION, __version__, 1, 4242, "elsewhere")


@pytest.mark.parametrize("change", [{"wire_version": WIRE_VERSION + 1}, {"package_version": "0.0.0"}])
def test_a_stage_of_another_version_is_refused_with_both_versions(
    awaited: tuple[Impostor, Future[Any]], change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    impostor, start = awaited
    impostor.say(msgspec.structs.replace(HELLO, **change))
    answer = impostor.hear()
    assert isinstance(answer, Refused) and answer.final
    for version in (change.get("package_version", __version__), __version__, str(WIRE_VERSION)):
        assert version in answer.reason
    assert answer.reason in caplog.text and "elsewhere" in caplog.text
    assert not start.done()


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"garbage", "stage 1 sent nonsense"),
        (encode(Refused("you")), "stage 1 sent nonsense"),
        (encode(Ready()), "ready too early"),
        (encode(Failed("ModelLoadError", "no room", "Traceback", [])), "stage 1: no room"),
    ],
)
def test_what_a_stage_should_not_say_fails_the_start(
    awaited: tuple[Impostor, Future[Any]], said: bytes, says: str
) -> None:
    impostor, start = awaited
    impostor.say(HELLO)
    setup = impostor.hear()
    assert isinstance(setup, Setup)
    assert (setup.index, setup.num_stages, setup.inbound, setup.binds_tcp) == (1, 2, None, True)
    impostor.say(said)
    with pytest.raises((EngineDeadError, WireError, ModelLoadError), match=says):
        start.result(SECONDS)
    farewell = impostor.hear()
    assert isinstance(farewell, Stop)


def test_a_stage_may_say_hello_again_until_it_is_answered(awaited: tuple[Impostor, Future[Any]]) -> None:
    """Each connection asks for one, and the first may have been cut before anything went through."""
    impostor, start = awaited
    impostor.say(HELLO)
    impostor.say(HELLO)
    assert isinstance(impostor.hear(), Setup)
    impostor.say(Failed("ModelLoadError", "no room", "Traceback", []))
    with pytest.raises(ModelLoadError, match="stage 1: no room"):
        start.result(SECONDS)


def test_a_second_one_for_the_same_place_is_asked_to_come_again(awaited: tuple[Impostor, Future[Any]]) -> None:
    impostor, start = awaited
    impostor.say(HELLO)
    assert isinstance(impostor.hear(), Setup)
    with impostor.context.socket(zmq.DEALER) as second:
        impostor.key.secure(second, server=False)
        second.connect(impostor.socket.get_string(zmq.LAST_ENDPOINT))
        second.send_multipart([impostor.key.token, encode(HELLO)])
        assert second.poll(SECONDS * 1000)
        assert decode_to_stage(second.recv()) == Refused("stage 1 is here already", final=False)
    assert not start.done()


def checkpoint(folder: Path, byte: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["None"], "num_hidden_layers": 2}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes([byte]) * 100)
    return folder


def test_a_stage_with_another_checkpoint_is_refused_with_both_fingerprints(hosts: Hosts, tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1), checkpoint(tmp_path / "theirs", 2)
    config = EngineConfig.of(pipeline_parallel_size=1, remote_stages="0", num_kv_blocks=50, **hosts.settings)
    executor = make_zmq(ExecutorSpec(config, make_stage, block_size=16, model_path=str(ours)))
    joined = hosts.join(0, "--model", str(theirs))
    with pytest.raises(ModelLoadError) as caught:
        executor.start()
    assert fingerprint(ours) in str(caught.value) and fingerprint(theirs) in str(caught.value)
    assert joined.wait(SECONDS) == 1
    assert fingerprint(theirs) in hosts.log_of(joined)


def test_a_stage_that_ends_takes_its_process_along(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it waits for an engine that never comes; ``hosts`` looks whether anything is left."""
    tell_stages(monkeypatch, 2)
    joined = hosts.join(1)
    deadline = time.monotonic() + SECONDS
    while not psutil.Process(joined.pid).children():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    joined.kill()


def test_a_stage_notices_that_the_engine_is_gone_and_waits_for_the_next(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_stages(monkeypatch, 2)
    script = (
        "import sys, json; from tests.engine.executors.zmq_toys import toy_executor;"
        "executor = toy_executor(2, remote_stages='1', **json.loads(sys.argv[1])); executor.start();"
        "print('up', flush=True); executor.collect(60)"
    )
    joined = hosts.join(1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(hosts.settings)], stdout=subprocess.PIPE, env=environment
    ) as engine:
        assert engine.stdout is not None and engine.stdout.readline() == b"up\n"
        engine.kill()
    executor = toy_executor(2, remote_stages="1", **hosts.settings)
    executor.start()
    check_tokens(executor)
    executor.shutdown()
    assert joined.wait(SECONDS) == 0
    assert "nothing was heard of the engine" in hosts.log_of(joined)
