"""Real servers in processes of their own, in which an event loop or an unpickled class is fatal."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 60
SETTINGS = ("--num-kv-blocks", "100", "--cpu-threads", "1")

_SITECUSTOMIZE = """
import asyncio, os, sys
def refuse(*args, **kwargs):
    raise RuntimeError("somebody asked for an event loop")
asyncio.run = asyncio.new_event_loop = asyncio.events.new_event_loop = refuse
def audit(event, args):
    if event == "pickle.find_class":
        os.write(2, f"UNPICKLED {args}\\n".encode())
        os._exit(86)
sys.addaudithook(audit)
"""


@dataclass
class Server:
    """A running ``llm-engine serve``."""

    process: subprocess.Popen[str]
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key="none", max_retries=0, timeout=60, **more)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one exchange. A dict becomes JSON; bytes and iterators go as they are."""
        connection = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        status, _, text = self.request("GET", "/metrics")
        assert status == 200
        found = [
            sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == f"llm_engine_{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, name
        return sum(found)

    def wait_for(self, name: str, value: float, timeout: float = 10.0) -> float:
        """Seconds until a metric has the value."""
        start = time.monotonic()
        while (now := self.metric(name)) != value:
            assert time.monotonic() - start < timeout, f"{name} is still {now}"
            time.sleep(0.005)
        return time.monotonic() - start

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def guarded_environment(folder: Path) -> dict[str, str]:
    """In which Python processes, and what they fork, can have no event loop and unpickle no class."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serving(folder: Path, *words: str) -> Iterator[Server]:
    """Start a server on a free port and wait until it serves; kill it at the end if it still runs."""
    environ = guarded_environment(folder)
    command = [sys.executable, "-m", "llm_engine", "serve", "--port", "0", *SETTINGS, *words]
    process = subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True)
    server = Server(process)
    started = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line)
            if found := re.search(r"serves .* at http://[^:]+:(\d+)", line):
                server.port = int(found[1])
                started.set()
        started.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        started.wait(START_TIMEOUT)
        assert server.port, "".join(server.lines)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as they found it; ends cleanly or the last test fails."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.stop() == 0
    assert not [line for line in running.lines if "UNPICKLED" in line or "event loop" in line or "Traceback" in line]


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()
