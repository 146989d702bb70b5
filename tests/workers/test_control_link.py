"""A stage's process and whoever started it: what it does when that one is gone, or talks nonsense."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from llm_engine.workers.control import Failed, Hello, Launch, Stop, decode_from_stage, encode

TOKEN = bytes(range(16))
SECONDS = 20.0
_STAGE = [sys.executable, "-P", "-m", "llm_engine.workers.stage_process"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[zmq.Socket[bytes]]:
    """The engine's end of the control connections, at ``control`` in the test's folder."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVTIMEO, int(SECONDS * 1000))
        socket.bind(f"ipc://{tmp_path}/control")
        yield socket


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def launch(folder: Path, parent_pid: int) -> bytes:
    told = Launch(f"ipc://{folder}/control", TOKEN.hex(), 0, parent_pid)
    return msgspec.json.encode(told) + b"\n"


def test_nonsense_from_the_engine_is_answered_with_a_failure_that_blames_it(
    engine: zmq.Socket[bytes], tmp_path: Path
) -> None:
    with subprocess.Popen(_STAGE, stdin=subprocess.PIPE) as stage:
        assert stage.stdin is not None
        stage.stdin.write(launch(tmp_path, os.getpid()))
        stage.stdin.flush()
        identity, token, frame = engine.recv_multipart()
        assert token == TOKEN and isinstance(decode_from_stage(frame), Hello)
        engine.send_multipart([identity, b"\xc1 this is nothing"])
        told = [decode_from_stage(engine.recv_multipart()[2]) for _ in range(3)]  # heartbeats, too
        assert [message.blames for message in told if isinstance(message, Failed)] == [-1]
        engine.send_multipart([identity, encode(Stop(final=True))])
        assert stage.wait(SECONDS) == 0


def test_an_engine_in_the_place_of_one_that_never_answered_hears_of_the_stage(
    engine: zmq.Socket[bytes], tmp_path: Path
) -> None:
    """An engine that ended right then: else the stage would wait for the next one, and that for the stage."""
    address = engine.get_string(zmq.LAST_ENDPOINT)
    with subprocess.Popen(_STAGE, stdin=subprocess.PIPE) as stage:
        assert stage.stdin is not None
        stage.stdin.write(launch(tmp_path, os.getpid()))
        stage.stdin.flush()
        assert isinstance(decode_from_stage(engine.recv_multipart()[2]), Hello)
        assert not engine.poll(1200), "it says nothing more before it was answered"
        engine.unbind(address)
        with engine.context.socket(zmq.ROUTER) as following:
            following.set(zmq.LINGER, 0)
            following.set(zmq.RCVTIMEO, int(SECONDS * 1000))
            engine.close()
            following.bind(address)
            identity, token, frame = following.recv_multipart()
            assert token == TOKEN and isinstance(decode_from_stage(frame), Hello)
            following.send_multipart([identity, encode(Stop(final=True))])
            assert stage.wait(SECONDS) == 0


@pytest.mark.parametrize("moment", ["before it is told whom to join", "later"])
def test_a_stage_ends_with_its_parent_even_where_another_process_holds_its_standard_input(
    engine: zmq.Socket[bytes], tmp_path: Path, moment: str
) -> None:
    """And where the system does not kill it: here it never asks for that."""
    code = (
        "import signal, subprocess, sys\n"
        "stage = subprocess.Popen(sys.argv[1:], start_new_session=True)\n"
        "print(stage.pid, flush=True)\n"
        "signal.pause()\n"
    )
    stage = [sys.executable, "-P", "-c", "from llm_engine.workers.stage_main import run_process; run_process()"]
    theirs, ours = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code, *stage], stdin=theirs, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            if moment == "later":
                os.write(ours, launch(tmp_path, parent.pid))
                assert isinstance(decode_from_stage(engine.recv_multipart()[2]), Hello)
            parent.kill()
            parent.wait(SECONDS)
            if moment != "later":
                os.write(ours, launch(tmp_path, parent.pid))
            assert select.select([pidfd], [], [], SECONDS)[0], "it outlived its parent"
            assert moment == "later" or not engine.poll(0), "it did not join first"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for descriptor in (pidfd, theirs, ours):
                os.close(descriptor)
