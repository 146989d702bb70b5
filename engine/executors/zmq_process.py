"""A stage's process on this host: how it is started, how its end is noticed, and how it is made to end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from ...core.errors import ConfigError
from ...workers.control import FIRST_WORDS, Launch

_MODULE = "llm_engine.workers.stage_process"
_FIRST_WORDS = 4096
"""Bytes that are shown of them, the last ones."""


class StageProcess:
    """Started in the constructor, by the thread that lives as long as the stage is to: the system kills a stage when
    the thread that started it ends. Owned by that thread."""

    def __init__(self, launch: Launch) -> None:
        self.index = launch.index
        self.has_ring = launch.ring is not None
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_search_path())}
        threads = {} if launch.num_threads is None else {"OMP_NUM_THREADS": str(launch.num_threads)}
        environment |= {name: value for name, value in threads.items() if name not in os.environ}
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            environment["GOMP_SPINCOUNT"] = "1000"  # long spinning burns the time slices of the stage beside it
        if not sys.executable:
            raise ConfigError("executor", "zmq", "inproc: this program does not say where its Python interpreter is")
        # Until it joins its standard error is this file, which it then passes on to its standard output: so the engine
        # can tell what became of one that never joins.
        self._first_words: int | None = os.memfd_create(FIRST_WORDS)
        try:
            self._popen = subprocess.Popen(
                # -P: no folder of the caller's before the packages
                [sys.executable, "-P", "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=_standard_error(),
                stderr=self._first_words,
                env=environment,
                # Of its own, for Ctrl-C and for ``kill``. Not a session: the system may give each of those an equal
                # share of a core (autogroup), and then the engine's threads go before a stage whose tokens have come.
                process_group=0,
                pass_fds=() if launch.ring is None else (launch.ring,),
            )
        except BaseException:
            os.close(self._first_words)
            raise
        assert self._popen.stdin is not None
        self._stdin = self._popen.stdin
        self._pidfd = _pidfd(self._popen.pid)
        self.ended = False
        self._last_words = ""
        with contextlib.suppress(OSError):  # one that has ended already is noticed soon enough
            os.write(self._stdin.fileno(), msgspec.json.encode(launch) + b"\n")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """Negative for the signal that ended it; ``None`` while it lives."""
        return self._popen.returncode

    @property
    def pidfd(self) -> int | None:
        """Turns readable when the process ends; ``None`` where the system has no such thing, or it was seen."""
        return self._pidfd

    @property
    def first_words(self) -> str:
        """What it has written to its standard error, the end of it; nothing once it has joined."""
        if self._first_words is None:
            return self._last_words
        start = max(0, os.fstat(self._first_words).st_size - _FIRST_WORDS)
        return os.pread(self._first_words, _FIRST_WORDS, start).decode("utf-8", "replace").strip()

    def poll(self) -> str | None:
        """How the process ended; ``None`` while it lives."""
        code = self._popen.poll()
        if code is None:
            return None
        if not self.ended:
            self.ended = True
            self._let_go()
        if code >= 0:
            return f"its process ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process was ended by signal {-code}"

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP, a debugger)."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in ("T", "t")

    def ask_to_end(self) -> None:
        """End its standard input: it comes to an end by itself, if it can."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def kill(self) -> None:
        """End it and whatever it has started."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so long."""
        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.poll(max(seconds, 0.0) * 1000)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(max(seconds, 0.0))
        return self.poll() is not None

    def _let_go(self) -> None:
        self.ask_to_end()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._first_words is not None:
            self._last_words = self.first_words
            os.close(self._first_words)
            self._first_words = None


def _search_path() -> list[str]:
    """Where this process finds modules, for one that starts in no particular folder."""
    paths = dict.fromkeys(os.path.abspath(entry) for entry in sys.path)
    return [path for path in paths if os.pathsep not in path]


def _standard_error() -> int:
    """A stage's output belongs to nobody's data: it goes where errors go, if they go anywhere."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
