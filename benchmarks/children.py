"""A measurement in a process of its own that prints a JSON line per finding, and that never outlives its time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ChildError(Exception):
    """A process did not bring what it was asked for; the first line says how it ended, the rest is its stderr."""


def json_lines(command: Sequence[str], timeout: float) -> Generator[dict[str, Any], None, None]:
    """Run the command in the repository's root and yield its lines as they come.

    It and all that it started are ended on the way out, and after ``timeout`` seconds. Raises ``ChildError``.
    """
    with tempfile.TemporaryFile("w+") as log:
        try:
            # A session of its own, so that all it has started can be ended with it.
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ChildError(f"{command[0]}: {error}") from error
        alarm = threading.Timer(timeout, _end, [process.pid])
        alarm.start()
        assert process.stdout is not None
        try:
            yield from map(json.loads, process.stdout)
            code = process.wait()
        finally:
            alarm.cancel()
            _end(process.pid)
            process.wait()
            process.stdout.close()
        if code != 0:
            log.seek(0)
            raise ChildError(f"exit code {code} (limit {timeout:.0f} s)\n{log.read()[-4000:]}")


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
