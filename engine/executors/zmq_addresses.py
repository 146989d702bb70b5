"""Where the sockets of stage processes lie."""

from __future__ import annotations

import os
import shutil
import tempfile

from ...core.errors import ConfigError

_LONGEST = 107
"""Bytes of a socket file's path, as the system allows it."""


class SocketFolder:
    """A private folder (0700) for the socket files of one start of the stages. Owned by one thread."""

    def __init__(self) -> None:
        """Raises ``ConfigError`` where the folder for temporary files cannot be used."""
        parent = None
        try:
            parent = tempfile.gettempdir()
            self.path = tempfile.mkdtemp(prefix="llm-engine-", dir=parent)
        except OSError as error:
            wanted = f"a folder for temporary files that can be written to ({error.strerror or error})"
            raise ConfigError("TMPDIR", parent or os.environ.get("TMPDIR"), wanted) from error
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
