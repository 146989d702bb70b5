"""Which prompts get how many of the tokens that a micro-batch has left for them.

``fcfs``: each in turn, prompts in progress by admission and then the waiting by the ordering, takes all that is left.
``equal-progress``: rounds, in each of which everybody in the same order is offered one more unit. Both policies of
TensorRT-LLM's chunking, but for this: an unrounded chunk rather than none, since decodes that leave less than a unit
must not starve the prompts; and who gets nothing is not admitted, so it takes no row and no seat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.config import check_choices, option
from ..core.views import RequestView
from .base import Capacity, Ordering, Verdict
from .filling import start_prompt, take_chunk
from .outstanding import tokens_worth, worth
from .scheduling_pass import SchedulingPass

CHUNKINGS = ("fcfs", "equal-progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkingOptions:
    """Of the micro-batch policies that chunk prompts."""

    chunking: str = option(
        "fcfs",
        "how prompts share a micro-batch: each in turn takes all it can, or a chunk unit at a time",
        choices=CHUNKINGS,
    )

    def __post_init__(self) -> None:
        check_choices(self)


def take_prompts(
    step: SchedulingPass,
    waiting: Ordering,
    capacity: Capacity,
    chunking: str,
    *,
    room: float | None = None,
    price: float = 0.0,
) -> None:
    """Fill what the decodes left of the micro-batch: chunks that take as long as ``room`` tokens without history where
    a token before costs ``price`` of a token, within the token budget, which is all there is without ``room``. The room
    is no sharp bound: a chunk goes to the unit nearest to it."""
    filler = _Filler(step, capacity, chunking, float(step.tokens_left) if room is None else room, price)
    filler.walk(waiting)
    if chunking == "equal-progress":
        filler.even_out()
    step.tokens_left = filler.tokens


class _Filler:
    def __init__(self, step: SchedulingPass, capacity: Capacity, chunking: str, room: float, price: float) -> None:
        self.step, self.capacity, self.room, self.price = step, capacity, room, price
        self.tokens = step.tokens_left
        self.unit = step.limits.unit
        self.one_unit_each = chunking == "equal-progress"
        self.chunks: list[Chunk] = []
        """Parallel to the plan's, which must have had none."""

    def walk(self, waiting: Ordering) -> None:
        """Everybody in order, as long as there is room."""
        step = self.step
        for request in step.table.prefilling.values():
            start = request.num_computed_tokens
            if not self._offer(start):
                return
            self._took(request, start, take_chunk(step, request, self.capacity))
        if self._is_full:
            return
        num_skipped = 0
        for request in self.capacity.candidates(step, waiting):
            start = step.prefix(request).num_tokens
            if not self._offer(start):
                return
            verdict = self.capacity.judge(step, request)
            if verdict is Verdict.STOP:
                return
            if verdict is not Verdict.ADMIT:
                num_skipped += 1
                if num_skipped > step.most_skipped:
                    return
                continue
            num_skipped = 0
            used = start_prompt(step, request)
            if not used:
                return
            self._took(request, start, used)
            if self._is_full:
                return

    @property
    def _is_full(self) -> bool:
        """Whether nobody who waits can come in: then nobody is asked who it would be, which may cost something."""
        return self.tokens <= 0 or self.step.rows_left <= 0 or self.step.is_full

    def _offer(self, start: int) -> bool:
        """Leave in ``step.tokens_left`` what one whose next token is at ``start`` may take; whether it is anything."""
        step = self.step
        least = 0 if step.plan.num_rows else 1  # a token whose history costs too much, rather than nothing for ever
        offer = max(least, tokens_worth(self.room, start, self.price))
        if offer < self.tokens:
            # A step is not worth being cut short for part of a unit: to the next one or back to the last, as is nearer.
            nearest = (start + offer + self.unit // 2) // self.unit * self.unit - start
            offer = nearest if nearest > 0 else offer
        offer = min(self.tokens, offer)
        step.tokens_left = min(offer, self.unit - start % self.unit) if self.one_unit_each else offer
        return step.has_room

    def _took(self, request: RequestView, start: int, size: int) -> None:
        if size:
            self.tokens -= size
            self.room -= worth(start, size, self.price)
            if self.one_unit_each:
                most = self.step.longest_chunk(start, request.num_tokens - start)
                self.chunks.append(Chunk(start, size, most))

    def even_out(self) -> None:
        """The rounds behind the first, which has said who takes part. One that finds no block stays as it is: nobody
        is paused for somebody who runs anyhow."""
        if self.tokens <= 0:
            return
        sizes = equal_progress(self.chunks, self.unit, self.tokens, self.room, self.price)
        for row, (chunk, size) in enumerate(zip(self.chunks, sizes, strict=True)):
            if size > chunk.size and self.step.lengthen(row, size - chunk.size):
                self.tokens -= size - chunk.size


@dataclass(frozen=True, slots=True)
class Chunk:
    """``size`` tokens from ``start`` so far, of at most ``most``."""

    start: int
    size: int
    most: int


def equal_progress(
    chunks: Sequence[Chunk], unit: int, tokens: int, room: float | None = None, price: float = 0.0
) -> list[int]:
    """Sizes after as many rounds as ``tokens`` more, worth ``room``, allow.

    A round offers each in order what is missing to its next multiple of the unit, or to its end. What would exceed the
    budget is not taken, and will not be later: the budget only shrinks, so who was refused once is done. Rounds in
    which nobody is refused are counted rather than gone through.
    """
    rounds = _Rounds(chunks, unit, tokens, float(tokens) if room is None else room, price)
    while rounds.open:
        whole = rounds.most_without_a_refusal()
        if whole:
            rounds.go_through(whole)
        rounds.go_through(1)
    return rounds.sizes


class _Rounds:
    def __init__(self, chunks: Sequence[Chunk], unit: int, tokens: int, room: float, price: float) -> None:
        self.chunks, self.unit, self.tokens, self.room, self.price = chunks, unit, tokens, room, price
        self.sizes = [chunk.size for chunk in chunks]
        self.open = [row for row, chunk in enumerate(chunks) if chunk.size < chunk.most]
        """Rows that may still grow."""

    def go_through(self, rounds: int) -> None:
        """So many rounds in one."""
        still_open = []
        for row in self.open:
            size = self._after(row, rounds)
            count, cost = size - self.sizes[row], self._cost(row, size)
            if count <= self.tokens and cost <= self.room:
                self.tokens, self.room, self.sizes[row] = self.tokens - count, self.room - cost, size
                if size < self.chunks[row].most:
                    still_open.append(row)
        self.open = still_open

    def most_without_a_refusal(self) -> int:
        """Found by doubling, then halving: costs the logarithm of the rounds."""
        last = max(-(-(self.chunks[row].most - self.sizes[row]) // self.unit) for row in self.open)
        fitting, step = 0, 1
        while fitting + step <= last and self._fit(fitting + step):
            fitting, step = fitting + step, 2 * step
        while step > 1:
            step //= 2
            if fitting + step <= last and self._fit(fitting + step):
                fitting += step
        return fitting

    def _fit(self, rounds: int) -> bool:
        sizes = [self._after(row, rounds) for row in self.open]
        count = sum(sizes) - sum(self.sizes[row] for row in self.open)
        if count > self.tokens or not self.price:
            return count <= min(self.tokens, self.room)
        return sum(map(self._cost, self.open, sizes)) <= self.room

    def _after(self, row: int, rounds: int) -> int:
        chunk = self.chunks[row]
        return min(chunk.most, ((chunk.start + self.sizes[row]) // self.unit + rounds) * self.unit - chunk.start)

    def _cost(self, row: int, size: int) -> float:
        return worth(self.chunks[row].start + self.sizes[row], size - self.sizes[row], self.price)
