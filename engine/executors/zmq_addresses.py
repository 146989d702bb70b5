"""Where the sockets of stage processes lie, and which of them two ends meet at."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from ...core.errors import ConfigError

ENGINE = -1
"""Among the numbers of stages."""
_LONGEST = 107
"""Bytes of a socket file's path, as the system allows it."""


class SocketFolder:
    """A private folder (0700) for the socket files of one start of the stages. Owned by one thread.

    Should this process be killed before ``remove``, a shell that waits for that removes it.
    """

    def __init__(self) -> None:
        """Raises ``ConfigError`` where the folder for temporary files cannot be used."""
        parent = None
        try:
            parent = tempfile.gettempdir()
            self.path = tempfile.mkdtemp(prefix="llm-engine-", dir=parent)
        except OSError as error:
            wanted = f"a folder for temporary files that can be written to ({error.strerror or error})"
            raise ConfigError("TMPDIR", parent or os.environ.get("TMPDIR"), wanted) from error
        self._remover = _start_remover(self.path)
        longest = len(os.fsencode(os.path.join(self.path, "results")))
        if longest > _LONGEST:
            self.remove()
            allowed = f"a path shorter by {longest - _LONGEST} bytes: socket files lie in it"
            raise ConfigError("TMPDIR", parent, allowed)

    def address(self, name: str) -> str:
        """Of a socket; ``name`` is at most as long as ``results``."""
        return f"ipc://{os.path.join(self.path, name)}"

    def remove(self) -> None:
        """Callable twice. Connections that exist live on."""
        shutil.rmtree(self.path, ignore_errors=True)
        remover, self._remover = self._remover, None
        if remover is not None:
            try:
                remover.communicate(b"\n", timeout=1.0)
            except subprocess.TimeoutExpired:  # somebody has stopped it
                remover.kill()
                remover.wait()


def _start_remover(path: str) -> subprocess.Popen[bytes] | None:
    """Reads a line; where there comes none, since whoever should write it is dead, it removes the folder."""
    script = 'read -r line || rm -rf -- "$0"'
    with contextlib.suppress(OSError):
        return subprocess.Popen(["/bin/sh", "-c", script, path], stdin=subprocess.PIPE, env={}, start_new_session=True)
    return None


class Links:
    """Who sends to whom, and over what: a socket file between two on the engine's host, else tcp."""

    def __init__(self, num_stages: int, remote: frozenset[int], *, feeds_back: bool) -> None:
        self.last = num_stages - 1
        self.feeds_back = feeds_back and num_stages > 1
        self._remote = remote

    def senders(self, receiver: int) -> list[int]:
        """Who sends to a stage, or to the engine."""
        if receiver == ENGINE:
            return [self.last]
        return [receiver - 1, self.last] if receiver == 0 and self.feeds_back else [receiver - 1]

    @property
    def ring_is_local(self) -> bool:
        """Whether the last stage feeds the first on one and the same host."""
        return self.feeds_back and not self.over_tcp(self.last, 0)

    def over_tcp(self, sender: int, receiver: int) -> bool:
        return sender in self._remote or receiver in self._remote

    def binds_tcp(self, receiver: int) -> bool:
        """Whether a stage, or the engine, must be reachable from other hosts."""
        return any(self.over_tcp(sender, receiver) for sender in self.senders(receiver))

    def address(self, sender: int, receiver: int, addresses: Sequence[str]) -> str:
        """The one of the receiver's addresses that the sender uses."""
        wanted = "tcp:" if self.over_tcp(sender, receiver) else "ipc:"
        return next(address for address in addresses if address.startswith(wanted))
