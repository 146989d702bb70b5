"""A stage in a process of its own: ``python -m llm_engine.workers.stage_process``, started by the engine.

Little is imported here: the first thing is that this process never outlives the thread that started it.
"""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the stage; does not return."""
    # The system kills it then, whatever it is doing: stopped, or in a kernel that holds the interpreter lock.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Behind a terminal that holds back what the background writes (tostop) it would be stopped at its first word.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    from .stage_main import run_process

    run_process()


if __name__ == "__main__":
    main()
