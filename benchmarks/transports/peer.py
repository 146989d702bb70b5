"""The other end, where it is a process: python -m benchmarks.transports.peer NAME ADDRESS CONTROL_FD [PIPE_FD]"""

from __future__ import annotations

import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from benchmarks.transports.driver import serve
from benchmarks.transports.kinds import TRANSPORTS

if __name__ == "__main__":
    name, address, *numbers = sys.argv[1:]
    control, *pipes = (Connection(int(number)) for number in numbers)
    with suppress(EOFError):  # the measuring process is gone, and nobody is left to tell
        serve(control, TRANSPORTS[name].make(address, pipes[0] if pipes else None, False))
