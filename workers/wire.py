"""How a step travels: plans, activations and results as frames. Loads no torch, knows no socket.

A message is a list of frames. The first begins with a header of fixed size; behind it comes msgpack of the ``core``
dataclasses, and columns and tensors as they lie in memory. Whatever arrives is checked before it is used: types by
msgspec, sizes and ranges here, against ``PlanBounds``. What does not hold up raises ``WireError`` and nothing else.

::

    PLAN    header, PlanHead | decode columns, int64 [4 or 3, R] | OutputHead | hidden     (two last: not to stage 0)
    RESULT  header, StepResult
    FED     header, Fed                                                     (over a ``Ring``: Fed alone)
    PROBE   header, out or back: tries the links before the first plan
    RING    header: the probe on its way from the last stage to the first
    STOP    header: within a stage's process, from its side thread to the one that waits for all of these
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..core.step import RequestStart, StepPlan, StepResult

WIRE_VERSION = 2
"""Rises with every change of what travels; stages of another version are refused."""
TOKEN_BYTES = 16
MAX_FRAME = 1 << 30
"""Bytes. A longer frame is refused unread."""

_LATEST = 1e10
"""Seconds; no clock that counts from a start shows so many."""

Buffer = bytes | memoryview
Seconds = Annotated[float, msgspec.Meta(ge=0.0, lt=_LATEST)]
"""A moment on a monotonic clock, or a length of time, as it may arrive."""


class WireError(ValueError):
    """A message is not what it should be."""


class Kind(IntEnum):
    """What a message is."""

    PLAN = 1
    RESULT = 2
    FED = 3
    PROBE = 4
    RING = 5
    STOP = 6


# The class finds its members by a call of Python each, which takes long where nothing of it is in the caches.
PLAN, RESULT, FED, PROBE, RING, STOP = Kind
_KINDS = {int(kind): kind for kind in Kind}
_HEADER = struct.Struct(f"<{TOKEN_BYTES}sBQ")
"""What each message between stages begins with: the token of its epoch, which no stranger knows; what it is; its number
on its link, from 0, by which a lost one is noticed."""
HEADER_BYTES = _HEADER.size


def pack_header(token: bytes, kind: Kind, number: int) -> bytes:
    """The beginning of a message's first frame."""
    return _HEADER.pack(token, kind, number)


def unpack_header(frame: Buffer) -> tuple[bytes, Kind, int]:
    """Token, kind and number. Raises ``WireError``."""
    if len(frame) < HEADER_BYTES:
        raise WireError(f"{len(frame)} bytes, where a header alone is {HEADER_BYTES}")
    token, kind, number = _HEADER.unpack_from(frame)
    if kind not in _KINDS:
        raise WireError(f"a message of unknown kind {kind}")
    return token, _KINDS[kind], number


@dataclass(frozen=True, slots=True)
class PlanBounds:
    """What the numbers in a plan must stay below."""

    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    num_blocks: int
    hidden_size: int | None = None
    """Of a token's hidden state, exactly; ``None`` where nobody knows."""


class PlanHead(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A ``StepPlan`` but for its decode columns; field by field the same."""

    queue: int
    epoch: int
    step: int
    num_decodes: int
    feeds_from: int | None
    chunk_ids: list[int]
    chunk_tokens: list[int]
    chunk_slots: list[int]
    chunk_starts: list[int]
    chunk_samples: list[bool]
    starts: list[RequestStart]
    grown_slots: list[int]
    grown_blocks: list[int]
    paused_ids: list[int]
    moved_ids: list[int]
    moved_queues: list[int]
    resumed_ids: list[int]
    finished_ids: list[int]


class OutputHead(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A stage's output but for its hidden state."""

    busy: list[tuple[float, float]]
    error: str | None
    library: str = ""
    """numpy, torch, or nothing where no hidden state follows."""
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Fed(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """From the last stage to the first: what a step sampled; nothing where it failed."""

    step: int
    tokens: list[int]


_DECODE_COLUMNS = ("decode slots", "decode positions", "decode tokens")
_encoder = msgspec.msgpack.Encoder()
_plan_heads = msgspec.msgpack.Decoder(PlanHead)
_output_heads = msgspec.msgpack.Decoder(OutputHead)
_results = msgspec.msgpack.Decoder(StepResult)
_feds = msgspec.msgpack.Decoder(Fed)


def packed(message: Any) -> bytes:
    """As msgpack. Text that is no UTF-8, as a file's name may be, goes with the parts that are none written out."""
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError:
        return _encoder.encode(_written_out(msgspec.to_builtins(message, builtin_types=(bytes,))))


def _written_out(thing: Any) -> Any:
    if isinstance(thing, str):
        return thing.encode("utf-8", "backslashreplace").decode()
    if isinstance(thing, dict):
        return {_written_out(key): _written_out(value) for key, value in thing.items()}
    return [_written_out(part) for part in thing] if isinstance(thing, list | tuple) else thing


def encode_plan(plan: StepPlan) -> tuple[bytes, bytes]:
    """A booked plan as its two frames; ``plan`` may change afterwards."""
    num_decodes = len(plan.decode_ids)
    columns: list[Sequence[int]] = [plan.decode_ids, plan.decode_slots, plan.decode_positions]
    if plan.feeds_from is None:
        columns.append(plan.decode_tokens)
    block: NDArray[np.int64] = np.empty((len(columns), num_decodes), np.int64)
    for row, column in zip(block, columns, strict=True):
        row[:] = column
    head = PlanHead(
        queue=plan.queue,
        epoch=plan.epoch,
        step=plan.step,
        num_decodes=num_decodes,
        feeds_from=plan.feeds_from,
        chunk_ids=plan.chunk_ids,
        chunk_tokens=plan.chunk_tokens,
        chunk_slots=plan.chunk_slots,
        chunk_starts=plan.chunk_starts,
        chunk_samples=plan.chunk_samples,
        starts=plan.starts,
        grown_slots=plan.grown_slots,
        grown_blocks=plan.grown_blocks,
        paused_ids=plan.paused_ids,
        moved_ids=plan.moved_ids,
        moved_queues=plan.moved_queues,
        resumed_ids=plan.resumed_ids,
        finished_ids=plan.finished_ids,
    )
    return packed(head), block.tobytes()


def decode_plan(head_frame: Buffer, column_frame: Buffer, bounds: PlanBounds) -> StepPlan:
    """The plan, its decode columns as numpy arrays of its own. Raises ``WireError``."""
    head = _decode(_plan_heads, head_frame, "plan")
    _check_head(head, bounds)
    num_columns = 4 if head.feeds_from is None else 3
    if head.num_decodes < 0 or len(column_frame) != 8 * num_columns * head.num_decodes:
        raise WireError(f"{len(column_frame)} bytes of columns for {head.num_decodes} decode rows")
    block = np.frombuffer(column_frame, np.int64).reshape(num_columns, -1).copy()  # aligned
    if head.num_decodes:
        lows, highs = block.min(axis=1).tolist(), block.max(axis=1).tolist()
        limits = (bounds.max_num_seqs, bounds.max_model_len, bounds.vocab_size)
        for name, low, high, limit in zip(_DECODE_COLUMNS, lows[1:], highs[1:], limits, strict=False):
            _within(name, (low, high), limit)
    columns: Any = block  # rows of it serve as sequences of ints
    return StepPlan(
        queue=head.queue,
        decode_ids=columns[0],
        chunk_ids=head.chunk_ids,
        chunk_tokens=head.chunk_tokens,
        paused_ids=head.paused_ids,
        moved_ids=head.moved_ids,
        moved_queues=head.moved_queues,
        epoch=head.epoch,
        step=head.step,
        decode_slots=columns[1],
        decode_positions=columns[2],
        decode_tokens=columns[3] if num_columns == 4 else (),
        feeds_from=head.feeds_from,
        chunk_slots=head.chunk_slots,
        chunk_starts=head.chunk_starts,
        chunk_samples=head.chunk_samples,
        starts=head.starts,
        grown_slots=head.grown_slots,
        grown_blocks=head.grown_blocks,
        resumed_ids=head.resumed_ids,
        finished_ids=head.finished_ids,
    )


def encode_result(result: StepResult) -> bytes:
    return packed(result)


def decode_result(frame: Buffer) -> StepResult:
    """Raises ``WireError``. Whether it answers the plan it should is for the receiver to say."""
    result: StepResult = _decode(_results, frame, "result")
    _check_times(result.busy)
    return result


def encode_fed(fed: Fed) -> bytes:
    return packed(fed)


def decode_fed(frame: Buffer, bounds: PlanBounds) -> Fed:
    """Raises ``WireError``."""
    fed = _decode(_feds, frame, "fed tokens")
    if fed.tokens:
        _within("fed tokens", fed.tokens, bounds.vocab_size)
    return fed


def encode_output_head(head: OutputHead) -> bytes:
    return packed(head)


def decode_output_head(frame: Buffer) -> OutputHead:
    """Raises ``WireError``."""
    head: OutputHead = _decode(_output_heads, frame, "stage output")
    _check_times(head.busy)
    return head


def _decode(decoder: Any, frame: Buffer, what: str) -> Any:
    if len(frame) > MAX_FRAME:
        raise WireError(f"{what}: a frame of {len(frame)} bytes")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise WireError(f"{what}: {error}") from error


def _check_times(busy: Sequence[tuple[float, float]]) -> None:
    """Each span is of one stage's clock; how they lie to one another is not known, since clocks differ."""
    for began, ended in busy:
        if not 0.0 <= began <= ended < _LATEST:
            raise WireError(f"a stage that computed from {began} to {ended}")


def _check_head(head: PlanHead, bounds: PlanBounds) -> None:
    num_chunks = len(head.chunk_ids)
    for name in ("chunk_tokens", "chunk_slots", "chunk_starts", "chunk_samples"):
        if len(getattr(head, name)) != num_chunks:
            raise WireError(f"{num_chunks} chunks with {len(getattr(head, name))} {name}")
    if num_chunks:
        _within("chunk slots", head.chunk_slots, bounds.max_num_seqs)
        if min(head.chunk_tokens) < 1 or min(head.chunk_starts) < 0:
            raise WireError("a chunk without tokens, or before its request")
        ends = [start + count for start, count in zip(head.chunk_starts, head.chunk_tokens, strict=True)]
        _within("chunk ends", ends, bounds.max_model_len + 1)
    if len(head.grown_slots) != len(head.grown_blocks):
        raise WireError(f"{len(head.grown_slots)} slots grow by {len(head.grown_blocks)} blocks")
    if head.grown_slots:
        _within("grown slots", head.grown_slots, bounds.max_num_seqs)
        _within("grown blocks", head.grown_blocks, bounds.num_blocks)
    for start in head.starts:
        _check_start(start, bounds)


def _check_start(start: RequestStart, bounds: PlanBounds) -> None:
    _within("slots", (start.slot,), bounds.max_num_seqs)
    _within("known tokens", (len(start.token_ids),), bounds.max_model_len + 1)
    _within("prompt tokens", (start.num_prompt_tokens,), len(start.token_ids) + 1)
    if start.token_ids:
        _within("tokens", start.token_ids, bounds.vocab_size)
    if start.block_ids:
        _within("blocks", start.block_ids, bounds.num_blocks)


def _within(what: str, values: Sequence[int], limit: int) -> None:
    low, high = min(values), max(values)
    if low < 0 or high >= limit:
        raise WireError(f"{what} from {low} to {high}: 0 to {limit - 1} is allowed")
