"""A step trace: the records of an engine's last steps, as a file that Perfetto opens and that reads back whole.

The file is Chrome's trace event format, JSON: one process, a track for each thread of the engine and each stage,
counters, and an arrow from each plan through its stages to its update. The schedule event of a step holds the whole
record in ``args``; everything else in the file is drawn from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any

import msgspec

from ..core.errors import ConfigError
from ..core.trace import StepStats
from .trace_events import events_of, names_of

logger = logging.getLogger(__name__)

FORMAT = "llm-engine step trace"
FORMAT_VERSION = 1

MOST = 1 << 53
"""Tokens, blocks and whatever is counted in a trace: a float holds all numbers up to here."""
LONGEST = 1e9
"""Seconds from the zero of a clock that counts from when a host was started: thirty years."""
Count = Annotated[int, msgspec.Meta(ge=1, le=MOST)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMetadata:
    """What was run. ``clock`` is the records' clock (``time.monotonic``) when the wall clock showed ``started_at``."""

    version: str
    """Of llm-engine."""
    model: str
    scheduler: str
    num_stages: Count
    num_queues: Count
    layers_per_stage: tuple[Count, ...] = ()
    """Empty where not known."""
    limits: Mapping[str, Annotated[int, msgspec.Meta(ge=0, le=MOST)] | None] = field(default_factory=dict)
    """The scheduler's, by name."""
    num_kv_blocks: Count | None = None
    """In the pool, the null block included."""
    block_size: Count | None = None
    num_cores: Count | None = None
    """Of the engine's host."""
    on_cuda: bool | None = None
    """``None``, and no window and context either, in traces of before they were noted."""
    sliding_window: Count | None = None
    """Of the cache: where every layer has one, the widest."""
    max_model_len: Count | None = None
    started_at: float = 0.0
    """Seconds since 1970; 0 on a virtual clock."""
    clock: float = 0.0
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class TraceFile:
    """What a trace file holds; records in the order of their retirement."""

    metadata: TraceMetadata
    records: list[StepStats]


class StepTrace:
    """An engine's last ``size`` records, and where they are written at its end.

    The output thread appends to ``records``; anybody may copy and write them. Raises ``ConfigError`` where nothing can
    be written at ``path``.
    """

    def __init__(self, size: int, path: str | None = None) -> None:
        if path is not None:
            check_writable(path)
        self.records: deque[StepStats] = deque(maxlen=size)
        self.metadata: TraceMetadata | None = None
        """Set once the stages are up."""
        self._path = path

    def write(self, path: str) -> None:
        """Write what there is now. Raises ``OSError``."""
        assert self.metadata is not None, "before the stages are up"
        write_trace(path, self.metadata, self.records.copy())  # copied at once: the output thread appends meanwhile

    def write_at_end(self) -> None:
        """Write to the path of the settings, if any. Never raises: the engine is ending, perhaps for another reason."""
        if self._path is None or self.metadata is None:
            return
        try:
            self.write(self._path)
        except OSError as error:
            logger.error("the step trace could not be written to %s: %s", self._path, error)


def write_trace(path: str, metadata: TraceMetadata, records: Sequence[StepStats] | deque[StepStats]) -> None:
    """Write a trace file, whole or not at all: a file that is there is replaced in the end. Raises ``OSError``."""
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            file.writelines(_encoded(metadata, records))
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def read_trace(path: str) -> TraceFile:
    """The records of a trace file, as they were. Raises ``ConfigError`` for any other file, and for none."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ConfigError("trace", path, f"a file that can be read ({error.strerror})") from error
    try:
        document = msgspec.json.decode(data, type=_Document)
        about = document.otherData
        if about.get("format") != FORMAT or about.get("format_version") != FORMAT_VERSION:
            raise msgspec.ValidationError(f"it is no {FORMAT} of version {FORMAT_VERSION}")
        metadata = msgspec.convert(about, TraceMetadata)
        decoder = msgspec.json.Decoder(StepStats)
        records = [decoder.decode(event.args) for event in document.traceEvents if event.cat == "schedule"]
        for record in records:
            _check(record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError("trace", path, f"a step trace of this version of llm-engine ({error})") from error
    return TraceFile(metadata, records)


def check_writable(path: str, field: str = "trace") -> None:
    """Raise ``ConfigError`` for the setting ``field`` where no file can be written."""
    try:
        if os.path.isdir(path) or not os.path.basename(path):
            raise IsADirectoryError(None, "it is a folder")
        temporary = _beside(path)
        with open(temporary, "xb"):
            pass
        os.remove(temporary)
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be written ({error.strerror})") from error


_counts_of = attrgetter(*(f.name for f in fields(StepStats) if f.type == "int"))
_times_of = attrgetter("began_at", "booked_at", "pushed_at", "collected_at", "update_at", "retired_at")


def _check(record: StepStats) -> None:
    """Raise ``ValidationError`` for what no step can be: those who read traces reckon with it."""
    counts = _counts_of(record)
    if min(counts) < 0 or max(counts) > MOST or record.num_tokens < 1:
        raise msgspec.ValidationError(f"step {record.step} counts what cannot be")
    if max(map(abs, chain(_times_of(record), *record.busy))) > LONGEST or any(b > e for b, e in record.busy):
        raise msgspec.ValidationError(f"step {record.step} was at times that cannot be")


class _Event(msgspec.Struct):
    cat: str = ""
    args: msgspec.Raw = msgspec.Raw(b"{}")


class _Document(msgspec.Struct):
    traceEvents: list[_Event]
    otherData: dict[str, Any]


def _encoded(metadata: TraceMetadata, records: Iterable[StepStats]) -> Iterator[bytes]:
    """The file in pieces, a line for each step."""
    encode = msgspec.json.Encoder().encode
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(metadata)}
    yield b'{"displayTimeUnit":"ms",\n"otherData":' + encode(about) + b',\n"traceEvents":[\n'
    yield encode(names_of(metadata.model, metadata.num_stages))[1:-1]
    for events in events_of(records):
        yield b",\n"
        yield encode(events)[1:-1]
    yield b"\n]}\n"


def _beside(path: str) -> str:
    """A name in the same folder that nobody else uses, so that it can be renamed to ``path``."""
    return f"{path}.{uuid.uuid4().hex[:12]}.tmp"


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
