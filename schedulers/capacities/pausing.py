"""Whom to pause: when a resident finds no block, and when a waiting request outranks residents.

What the capacity policies that pause share. A request in flight is never paused, nor one that the plan carries already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ...core.request import BlockHash
from ...core.views import RequestView
from ..scheduling_pass import SchedulingPass


def pause_until_free(step: SchedulingPass, num_blocks: int) -> bool:
    """Pause whom the ordering would pause first, one by one, until so many blocks are free; whether they are."""
    while step.kv.free_blocks < num_blocks:
        chosen = {*step.plan.decode_ids, *step.plan.chunk_ids}
        candidates = (
            request
            for request in step.table.residents()
            if request.request_id not in chosen
            and not step.is_paused(request.request_id)
            and not step.table.is_in_flight(request)
        )
        victim = max(candidates, key=step.ordering.pause_key, default=None)
        if victim is None:
            return False
        step.pause(victim)
    return True


class Way:
    """The places that one pass clears for those who outrank residents, one newcomer after the other."""

    def __init__(self, step: SchedulingPass, kept: Callable[[SchedulingPass, int], int]) -> None:
        """``kept``: free blocks that are not given away, with so many seats free."""
        self._step, self._kept = step, kept
        self.changes: Counter[str | None] = Counter()
        """By tenant: the places granted, less the residents paused."""
        self._granted: list[RequestView] = []
        self._granted_blocks = 0
        self._to_compute: set[BlockHash | None] = set()

    def computes_for(self, newcomer: RequestView) -> bool:
        """Whether one that was granted a place will compute the first block that this one could find instead."""
        block = self._first_new_block(newcomer)
        return block is not None and block in self._to_compute

    def grant(self, newcomer: RequestView, needed: int) -> None:
        self._step.makes_way_for.add(newcomer.request_id)
        self.changes[newcomer.tenant] += 1
        self._granted.append(newcomer)
        self._granted_blocks += needed
        self._to_compute.add(self._first_new_block(newcomer))

    def pause(self, resident: RequestView) -> None:
        self._step.pause(resident)
        self.changes[resident.tenant] -= 1

    def has_place(self, needed: int) -> bool:
        """Whether a seat and so many blocks are left beside those that were granted."""
        seats = self._step.seats_left - len(self._granted)
        return seats > 0 and needed + self._kept(self._step, seats) <= self._room(self._due())

    def victims(self, newcomer: RequestView, needed: int, displaceable: Sequence[RequestView]) -> list[RequestView]:
        """The fewest of ``displaceable``, those to be paused first taken first, without whom the newcomer finds a seat
        and ``needed`` blocks and has a part in this micro-batch; none where it would not even without all of them. Each
        is displaced still when those before it are gone."""
        step = self._step
        victims, changes = [], self.changes.copy()
        for resident in sorted(displaceable, key=step.ordering.pause_key, reverse=True):
            if step.ordering.displaces(newcomer, resident, changes):
                changes[resident.tenant] -= 1
                victims.append(resident)
        if step.kv.free_blocks + sum(step.kv.num_held(victim.request_id) for victim in victims) < needed:
            return []
        due = self._due()
        room = self._room(due)
        freed = step.kv.would_release([victim.request_id for victim in victims], step.prefix(newcomer))
        for count, victim in enumerate(victims, start=1):
            if victim.request_id in step.table.prefilling:
                room += step.promised_to(victim)
            elif victim.request_id in due:
                room += step.kv.blocks_to_advance([victim.request_id])
            seats = step.seats_left - len(self._granted) + count
            fits = seats > 0 and needed + self._kept(step, seats) <= room + freed[count - 1]
            if fits and self._would_run(newcomer, victims[:count]):
                return victims[:count]
        return []

    def _due(self) -> list[int]:
        return [i for i in self._step.queue.due_for_block() if not self._step.is_paused(i)]

    def _room(self, due: Sequence[int]) -> int:
        step = self._step
        return step.kv.free_blocks - step.promised_blocks - step.kv.blocks_to_advance(due) - self._granted_blocks

    def _would_run(self, newcomer: RequestView, without: Sequence[RequestView]) -> bool:
        """Whether the micro-batch has room for a newcomer behind the queue's decodes, the prompts in progress and those
        who were granted a place, less those that would be paused."""
        step, limits, least = self._step, self._step.limits, 1
        gone = {request.request_id for request in without}.union(step.plan.paused_ids)
        decodes = len(step.queue) - sum(request_id in step.queue for request_id in gone)
        rows, tokens = step.rows_left - decodes, step.tokens_left - decodes * limits.tokens_per_decode
        for request in (*step.table.prefilling.values(), *self._granted):
            if rows <= 0 or tokens <= 0:
                return False
            if request.request_id not in gone:
                start = request.num_computed_tokens if request.is_resident else step.prefix(request).num_tokens
                rows, tokens = rows - 1, tokens - step.longest_chunk(start, request.num_tokens - start)
                # Behind another chunk one of less than a unit is not begun.
                least = min(limits.unit, newcomer.num_tokens - step.prefix(newcomer).num_tokens)
        return rows > 0 and tokens >= least

    def _first_new_block(self, request: RequestView) -> BlockHash | None:
        return self._step.first_new_block(request, self._step.prefix(request).num_tokens)
