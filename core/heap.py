"""The garbage collector in a process of our own."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Leave out of every later collection what is there now: modules and the model, which live as long as the process.

    A full collection that visits them stops all threads for 100 to 200 ms. To be called once, when all is loaded, and
    never in a process that is somebody else's: what they drop later in a cycle would stay.
    """
    gc.collect()
    gc.freeze()
