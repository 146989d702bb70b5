"""How a server ends: drained, at once, or before it began."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Server, serving
from .test_running import LONG, read_until, send


def start_stream(server: Server, tokens: int) -> socket.socket:
    sock = send(server, "/v1/completions", {**LONG, "max_tokens": tokens, "stream": True})
    read_until(sock, b"data:")
    return sock


def test_sigterm_finishes_the_running_stream_and_refuses_new_work(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        sock = start_stream(server, 600)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (status := server.request("GET", "/ready")[0]) == 200:
            assert time.monotonic() < deadline
        assert status == 503
        assert server.request("GET", "/health")[0] == 200
        status, headers, body = server.request("POST", "/v1/completions", {"prompt": "x"})
        assert (status, json.loads(body)["error"]["type"]) == (503, "ServiceUnavailableError")
        assert int(headers["Retry-After"]) > 0
        text = read_until(sock, b"[DONE]")
        assert b'"finish_reason":"length"' in text
        sock.close()
        assert server.process.wait(20) == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        sock = start_stream(server, 1500)
        server.process.send_signal(signal.SIGTERM)
        while server.request("GET", "/ready")[0] == 200:
            pass
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        assert time.monotonic() - start < 2
        sock.close()


def test_the_time_for_draining_is_limited(tmp_path: Path) -> None:
    with serving(tmp_path, "--shutdown-timeout", "1") as server:
        sock = start_stream(server, 1500)
        start = time.monotonic()
        assert server.stop() == 0
        assert 0.9 < time.monotonic() - start < 6
        text = read_until(sock, b"[DONE]")  # told, not cut
        assert b'"error"' in text
        sock.close()


def test_a_worker_that_dies_ends_the_command(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert len(children) == 1
        subprocess.run(["kill", "-KILL", *children], check=True)
        assert server.process.wait(20) == 1
    assert any("the worker has died" in line for line in server.lines)


def failing(*words: str) -> tuple[int, list[str]]:
    command: list[Any] = [sys.executable, "-m", "llm_engine", "serve", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "expected", "says"),
    [
        (("/nowhere/model", "--port", "0"), 1, "/nowhere/model"),
        (("--port", "0", "--num-kv-blocks", "2", "--max-model-len", "5000000"), 1, "max_model_len"),
        (("--port", "0", "--scheduler", "gredy"), 2, "did you mean 'greedy'?"),
        (("--port", "0", "--kv-cache-manager", "lruu"), 2, "did you mean 'lru'?"),
        (("--port", "0", "--resource", "nowhere:Slots"), 2, "can be imported"),
    ],
)
def test_an_engine_that_cannot_start_ends_the_command_with_its_message(
    words: tuple[str, ...], expected: int, says: str
) -> None:
    code, lines = failing(*words)
    assert code == expected
    assert len(lines) == 1, lines
    assert lines[0].startswith("llm-engine serve: error: ")
    assert says in lines[0]


def test_a_port_that_is_taken_ends_the_command() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, lines = failing("--port", str(taken.getsockname()[1]))
    assert code == 2
    assert len(lines) == 1
    assert "in use" in lines[0]
