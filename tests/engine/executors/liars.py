"""Hooks for stages that send what they should not. Run in a stage's process."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import sys
from collections.abc import Sequence
from typing import Any

from llm_engine.core.step import StepResult
from llm_engine.workers.batch import StageBatch
from llm_engine.workers.links import Outbound
from llm_engine.workers.wire import Kind, decode_output_head, decode_result, encode_output_head, encode_result
from tests.freed_memory import pages_of_a_step
from tests.toy_model_engine import OnForward

_send = Outbound.send


def lie(how: str) -> OnForward:
    """From the first forward on every message is spoilt, in the way of that name."""

    def hook(number: int, batch: StageBatch) -> None:
        Outbound.send = globals()[how]  # type: ignore[method-assign]

    return hook


def noise(self: Outbound, kind: Kind, *frames: Any) -> None:
    _send(self, kind, *(b"\xc1 this is nothing" for _ in frames))


def skip(self: Outbound, kind: Kind, *frames: Any) -> None:
    self._next[kind] += 1
    _send(self, kind, *frames)


def swallow(self: Outbound, kind: Kind, *frames: Any) -> None:
    pass


def no_hidden(self: Outbound, kind: Kind, *frames: Any) -> None:
    _send(self, kind, *frames[:-1], b"")


def wrong_step(self: Outbound, kind: Kind, *frames: Any) -> None:
    _spoil(self, kind, frames, lambda result: setattr(result, "step", 77))


def wrong_tokens(self: Outbound, kind: Kind, *frames: Any) -> None:
    _spoil(self, kind, frames, lambda result: setattr(result, "tokens", [10**6]))


def no_times(self: Outbound, kind: Kind, *frames: Any) -> None:
    _spoil(self, kind, frames, lambda result: setattr(result, "busy", [(0.0, math.nan)] * 2))


def endless_times(self: Outbound, kind: Kind, *frames: Any) -> None:
    _spoil(self, kind, frames, lambda result: setattr(result, "busy", [(0.0, math.inf)] * 2))


def too_wide(self: Outbound, kind: Kind, *frames: Any) -> None:
    """Of a stage that is not the last."""
    head = decode_output_head(frames[2])
    head.shape, head.dtype = (head.shape[0], 2 * head.shape[1]), "float32"
    _send(self, kind, *frames[:2], encode_output_head(head), frames[3])


def times_between(self: Outbound, kind: Kind, *frames: Any) -> None:
    """Of a stage that is not the last."""
    head = decode_output_head(frames[2])
    head.busy = [(2.0, 1.0)]
    _send(self, kind, *frames[:2], encode_output_head(head), frames[3])


def _spoil(self: Outbound, kind: Kind, frames: Sequence[Any], change: Any) -> None:
    if kind is Kind.RESULT:
        result: StepResult = decode_result(frames[0])
        change(result)
        frames = [encode_result(result)]
    _send(self, kind, *frames)


def mumble() -> OnForward:
    """Logs and fails in text that is no UTF-8."""

    def hook(number: int, batch: StageBatch) -> None:
        logging.getLogger("toy").warning("cannot read caf\udce9")
        raise OSError("cannot read caf\udce9")

    return hook


def shout() -> OnForward:
    """Writes to standard error."""

    def hook(number: int, batch: StageBatch) -> None:
        print(f"forward {number}", file=sys.stderr, flush=True)

    return hook


def visit_little() -> OnForward:
    """Refuses to compute where the garbage collector visits what was loaded."""

    def hook(number: int, batch: StageBatch) -> None:
        assert gc.get_freeze_count() > 10_000

    return hook


def keep() -> OnForward:
    """Refuses to compute where what a forward frees has to come from the system again."""

    def hook(number: int, batch: StageBatch) -> None:
        pages = pages_of_a_step()
        assert number == 0 or pages < 1000, f"{pages} pages"

    return hook


def hold() -> OnForward:
    """Keeps the interpreter lock in its first forward, as a kernel that never returns might."""

    def hook(number: int, batch: StageBatch) -> None:
        ctypes.PyDLL(None).sleep(600)

    return hook
