"""A running queue: the decodes that share a micro-batch, as columns.

Rows advance together, so a row's position is kept as ``base + clock`` and pushing the whole queue is one increment.
What depends on the position modulo the block size, or on a row reaching its length limit, is looked up in two wheels
that hold only the rows concerned. A row left out of a push is re-filed in the wheels: the cost follows what changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import compress
from typing import NamedTuple

from .request import Request


class Rows(NamedTuple):
    """Rows of a queue, in columns of their own."""

    ids: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    """Each row computes next."""
    requests: list[Request]


class DecodeQueue:
    """Owned by the request table; every method under the state lock."""

    def __init__(self, index: int, block_size: int) -> None:
        self.index = index
        self.block_size = block_size
        self.in_flight = 0
        """Plans pushed for this queue that have not come back."""
        self.generation = 0
        """Rises whenever rows are added or removed, so that a result knows whether its rows still stand."""
        self.last_pushed = -1
        """Step of the last push; the queue idle for longest goes first."""
        self.last_sampled: int | None = None
        """Step of the last push that samples a token of a row, until that comes back and the token is known."""
        self.ids = array("q")
        self.slots = array("i")
        self.requests: list[Request] = []
        self._bases = array("q")
        self._clock = 0
        self._row_of: dict[int, int] = {}
        # dicts as ordered sets: O(1) removal, and iteration never depends on hashing
        self._block_wheel: list[dict[int, None]] = [{} for _ in range(block_size)]
        self._length_wheel: dict[int, dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._row_of

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @property
    def idle(self) -> bool:
        return self.in_flight == 0

    @property
    def num_pushes(self) -> int:
        """Pushes so far that carried rows of it."""
        return self._clock

    def position(self, request_id: int) -> int:
        """The position the row computes next; every position before it is computed or in flight."""
        return self._bases[self._row_of[request_id]] + self._clock

    def holds(self, ids: Set[int]) -> bool:
        """Whether each of them is here."""
        return self._row_of.keys() >= ids

    def rows(self, left_out: Iterable[int] = ()) -> Rows:
        """All rows but those of the ``left_out`` ids. Row by row at the interpreter's own speed: this is most of what a
        step of decodes costs."""
        clock = self._clock
        positions = [base + clock for base in self._bases]
        if not left_out:
            return Rows(self.ids[:], self.slots[:], positions, self.requests[:])
        kept = bytearray(b"\1") * len(self.ids)
        for request_id in left_out:
            kept[self._row_of[request_id]] = 0
        return Rows(
            array("q", compress(self.ids, kept)),
            array("i", compress(self.slots, kept)),
            list(compress(positions, kept)),
            list(compress(self.requests, kept)),
        )

    def due_for_block(self) -> list[int]:
        """Ids whose next position opens a block, so that pushing them needs one."""
        return list(self._block_wheel[-self._clock % self.block_size])

    def ending(self) -> list[int]:
        """Ids whose limit is reached by the tokens that the pushes so far sample: they are not to be pushed again."""
        return list(self._length_wheel.get(self._clock, ()))

    def add(self, request: Request, position: int) -> None:
        """Append a row that computes this position next: of its last known token or, where that is in flight, of the
        one after it."""
        request_id, base = request.request_id, position - self._clock
        self._row_of[request_id] = len(self.ids)
        self.ids.append(request_id)
        assert request.slot is not None
        self.slots.append(request.slot)
        self.requests.append(request)
        self._bases.append(base)
        self._file(request_id, base, request.max_total_tokens)
        self.generation += 1

    def remove(self, request_id: int) -> None:
        """Take a row out; the last row moves into its place."""
        row = self._row_of.pop(request_id)
        self._unfile(request_id, self._bases[row], self.requests[row].max_total_tokens)
        last = len(self.ids) - 1
        if row != last:
            self._row_of[self.ids[last]] = row
        for column in (self.ids, self.slots, self._bases):
            column[row] = column[last]
            column.pop()
        self.requests[row] = self.requests[last]
        self.requests.pop()
        self.generation += 1

    def advance(self, stalled: Iterable[int]) -> None:
        """Every row but the ``stalled`` ids was pushed once more."""
        self._clock += 1
        for request_id in stalled:
            row = self._row_of[request_id]
            limit = self.requests[row].max_total_tokens
            self._unfile(request_id, self._bases[row], limit)
            self._bases[row] -= 1
            self._file(request_id, self._bases[row], limit)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where columns, index and wheels disagree."""
        assert len(self.ids) == len(self.slots) == len(self.requests) == len(self._bases)
        assert self._row_of == {request_id: row for row, request_id in enumerate(self.ids)}
        filed = {i: b for b, bucket in enumerate(self._block_wheel) for i in bucket}
        assert filed == {i: base % self.block_size for i, base in zip(self.ids, self._bases, strict=True)}
        assert sorted(i for bucket in self._length_wheel.values() for i in bucket) == sorted(self.ids)
        for request, request_id, slot in zip(self.requests, self.ids, self.slots, strict=True):
            assert (request.request_id, request.slot, request.queue) == (request_id, slot, self.index)

    def _file(self, request_id: int, base: int, max_total_tokens: int) -> None:
        self._block_wheel[base % self.block_size][request_id] = None
        # Pushing position p yields token p + 1, the last one allowed when p + 2 == max_total_tokens; the clock then
        # reads p - base + 1.
        self._length_wheel.setdefault(max_total_tokens - 1 - base, {})[request_id] = None

    def _unfile(self, request_id: int, base: int, max_total_tokens: int) -> None:
        del self._block_wheel[base % self.block_size][request_id]
        due = max_total_tokens - 1 - base
        bucket = self._length_wheel[due]
        del bucket[request_id]
        if not bucket:
            del self._length_wheel[due]
