"""One pass over the books: the plan under construction and what is left of every budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.request import BlockHash
from ..core.step import StepPlan
from ..core.views import QueueView, RequestView, TableView
from ..kvcache.prefix_cache import PrefixMatch
from ..kvcache.resources import ResourceManager
from ..kvcache.view import KVView
from .drafts import fit_drafts
from .limits import Limits

if TYPE_CHECKING:
    from .base import Ordering


_MOST_SKIPPED = 32


class SchedulingPass:
    """What the three parts of a scheduler share while they make one plan for one queue.

    Nothing here changes the books: blocks, resources and pauses are counted in the pass only, and ``EngineCore``
    carries them out after it has checked the plan.
    """

    def __init__(
        self,
        now: float,
        table: TableView,
        kv: KVView,
        limits: Limits,
        queue: QueueView,
        resources: ResourceManager,
        ordering: Ordering,
    ) -> None:
        self.now, self.table, self.kv, self.limits, self.queue = now, table, kv, limits, queue
        self.ordering = ordering
        """Who waits; for a capacity policy that has to choose whom to pause."""
        self.plan = StepPlan(queue=queue.index)
        self.tokens_left = limits.max_num_batched_tokens
        self.rows_left = limits.max_micro_batch_seqs
        self.seats_left = limits.max_num_seqs - table.num_resident
        self.ahead = not queue.idle
        """Whether the queue's last micro-batch is still in flight, so that its decodes' inputs are not known yet."""
        self.is_short = False
        """Whether somebody was left out for want of a pause: a decode without a block, or a newcomer who would displace
        one in flight. A plan made ahead is dropped then, or its queue would never be idle and nobody ever paused."""
        self.makes_way_for: set[int] = set()
        """The waiting requests for whose sake residents were paused in this pass."""
        self.admitted: list[RequestView] = []
        self.chunk_drafts: list[int] = []
        """Parallel to the plan's chunks where something drafts: draft tokens each carries. Once finished."""
        self.reserved_blocks = 0
        """Blocks that those admitted in this pass take from the free list until their end, their first chunks included,
        if they grow as long as they may."""
        self._chunked: list[RequestView] = []
        self._chunk_ends: list[int] = []
        """Parallel to the plan's chunks: the position behind each."""
        self._paused: set[int] = set()
        self._promised: int | None = None
        self._being_computed: set[BlockHash] | None = None
        self._resources = resources
        kv.begin_pass()
        resources.begin_pass()

    @property
    def has_room(self) -> bool:
        """Whether the micro-batch can take one more row."""
        return self.tokens_left > 0 and self.rows_left > 0

    @property
    def is_full(self) -> bool:
        """Whether nobody who waits can become resident, whoever it is: no seat is left, or not the one block that even
        a prompt found in the cache needs. Then ordering and capacity need not be asked."""
        return self.seats_left <= 0 or self.kv.free_blocks <= 0

    @property
    def most_skipped(self) -> int:
        """Waiting requests in a row that are passed over; behind more of them nobody is looked at, or a pass would cost
        what waits. Everybody where nobody is resident: residents end by themselves, so nobody waits for ever."""
        return _MOST_SKIPPED if self.table.num_resident else len(self.ordering)

    def is_paused(self, request_id: int) -> bool:
        return request_id in self._paused

    def pause(self, request: RequestView) -> None:
        """Plan to take a resident's blocks back. It must not be in flight and not be in the plan yet."""
        self._promised = self._being_computed = None
        self.seats_left += 1
        self._paused.add(request.request_id)
        self.plan.paused_ids.append(request.request_id)
        self.kv.release(request.request_id)
        if request.request_id in self.plan.moved_ids:
            index = self.plan.moved_ids.index(request.request_id)
            del self.plan.moved_ids[index], self.plan.moved_queues[index]

    def move(self, ids: Sequence[int], queue: int) -> None:
        """Hand these rows of the queue, which must be idle, to another one."""
        self.plan.moved_ids += ids
        self.plan.moved_queues += [queue] * len(ids)

    def add_decodes(self, ids: Sequence[int], num_blocks: int) -> None:
        """Take these rows of the queue, which need ``num_blocks`` new blocks in all."""
        self.plan.decode_ids = ids
        self.kv.reserve(num_blocks)
        self.tokens_left -= len(ids) * self.limits.tokens_per_decode
        self.rows_left -= len(ids)

    def prefix(self, request: RequestView) -> PrefixMatch:
        """What the prefix cache holds of a waiting request's known tokens."""
        hashes = request.block_hashes if request.reads_prefix_cache else ()
        return self.kv.prefix(request.request_id, hashes, request.num_tokens)

    def is_being_computed(self, request: RequestView) -> bool:
        """Whether the first block a waiting request would compute, and could find instead, is the next one of a prompt
        in progress, or of one admitted in this pass: a later pass finds it in the cache. The delay of duplicate
        prefixes of TensorRT-LLM. Looked up among those who run now, so nobody waits for one that is gone."""
        found = self.prefix(request).num_tokens
        if found // self.kv.block_size >= (request.num_tokens - 1) // self.kv.block_size:
            return False  # a hit leaves the last token to compute: there is nothing more to find
        block = self.first_new_block(request, found)
        if block is None:
            return False
        if self._being_computed is None:
            unfilled = (
                self.first_new_block(resident, resident.num_computed_tokens)
                for resident in self.table.prefilling.values()
                if not self.is_paused(resident.request_id)
            )
            admitted = (self.first_new_block(r, self.prefix(r).num_tokens) for r in self.admitted)
            self._being_computed = {block for block in (*unfilled, *admitted) if block is not None}
        return block in self._being_computed

    def chunk_size(self, start: int, remaining: int) -> int:
        """Tokens of the next chunk of a prompt with ``remaining`` to go from ``start``; 0 when none fits now."""
        unit = self.limits.unit
        size = min(remaining, self.tokens_left, self.limits.long_prefill_token_threshold or remaining)
        if size == remaining:
            return size
        aligned = (start + size) // unit * unit - start
        if aligned > 0:
            return aligned
        # An unrounded chunk rather than none: decodes that leave less than a unit must not starve the prompts.
        return 0 if self.plan.chunk_ids else size

    def longest_chunk(self, start: int, remaining: int) -> int:
        """What ``chunk_size`` would be with a token budget that never ends."""
        threshold, unit = self.limits.long_prefill_token_threshold or remaining, self.limits.unit
        return remaining if remaining <= threshold else (start + threshold) // unit * unit - start

    def add_chunk(self, request: RequestView, num_tokens: int, num_blocks: int) -> None:
        """Take the next ``num_tokens`` of a resident's prompt, which need ``num_blocks`` blocks from the free list."""
        self._promised = None
        self.kv.reserve(num_blocks)
        self._add(request, request.num_computed_tokens, num_tokens)

    def start(self, request: RequestView, num_tokens: int) -> None:
        """Make a waiting request resident with a first chunk of ``num_tokens`` behind its prefix hit."""
        match = self.prefix(request)
        self.reserved_blocks += self.blocks_to_end(request) - self.kv.shared_by(match)
        self.kv.reserve(self.kv.blocks_to_start(match, match.num_tokens + num_tokens), match)
        if self._being_computed is not None and (block := self.first_new_block(request, match.num_tokens)) is not None:
            self._being_computed.add(block)
        self._resources.reserve(request)
        self.seats_left -= 1
        self.admitted.append(request)
        if self._promised is not None:
            self._promised += self._promise_to_admitted(request, num_tokens)
        self._add(request, match.num_tokens, num_tokens)

    def lengthen(self, row: int, num_tokens: int) -> bool:
        """Let the plan's chunk ``row`` compute so many tokens more; ``False`` where it finds no blocks for them."""
        request, size = self._chunked[row], self.plan.chunk_tokens[row]
        end, block_size = self._chunk_ends[row], self.kv.block_size
        if request.is_resident:
            more = self.kv.blocks_to_grow(request.request_id, end + num_tokens)
            more -= self.kv.blocks_to_grow(request.request_id, end)
        else:
            more = (size + num_tokens + block_size - 1) // block_size - (size + block_size - 1) // block_size
        if more > self.kv.free_blocks:
            return False
        self.kv.reserve(more)
        self._promised = None
        self.plan.chunk_tokens[row] += num_tokens
        self._chunk_ends[row] += num_tokens
        self.tokens_left -= num_tokens
        return True

    def finish(self) -> None:
        """The plan has all its rows: chunks that do not end their prompts come first, then those that do and are
        sampled from; within each by adapter, none first, else as they were taken."""
        if len(self._chunked) != len(self.plan.chunk_ids):
            return  # a policy wrote into the plan by itself
        if len(self._chunked) > 1:
            self._sort_chunks()
        if drafts := self.limits.num_draft_tokens:
            ends = (end == request.num_tokens for request, end in zip(self._chunked, self._chunk_ends, strict=True))
            chunks = zip(self.plan.chunk_tokens, self._chunk_ends, ends, strict=True)
            self.chunk_drafts = fit_drafts(
                chunks, drafts, self.kv.block_size, self.tokens_left, self.limits.long_prefill_token_threshold
            )

    def _sort_chunks(self) -> None:
        keys = [
            (end == request.num_tokens, request.adapter_id is not None, request.adapter_id or "")
            for request, end in zip(self._chunked, self._chunk_ends, strict=True)
        ]
        if all(key <= after for key, after in itertools.pairwise(keys)):
            return
        order = sorted(range(len(keys)), key=keys.__getitem__)
        plan = self.plan
        plan.chunk_ids, plan.chunk_tokens = [plan.chunk_ids[i] for i in order], [plan.chunk_tokens[i] for i in order]
        self._chunked, self._chunk_ends = [self._chunked[i] for i in order], [self._chunk_ends[i] for i in order]

    @property
    def promised_blocks(self) -> int:
        """Blocks that the prompts in progress and the admitted still need for their known tokens when this plan has
        run: free, but not free to give away. Kept as a sum, or a pass that admits many would cost their square."""
        if self._promised is None:
            planned = dict(zip(self.plan.chunk_ids, self.plan.chunk_tokens, strict=True))
            self._promised = sum(
                self.promised_to(request, planned.get(request.request_id, 0))
                for request in self.table.prefilling.values()
                if not self.is_paused(request.request_id)
            ) + sum(self._promise_to_admitted(request, planned[request.request_id]) for request in self.admitted)
        return self._promised

    def promised_to(self, resident: RequestView, planned: int = 0) -> int:
        """Blocks that a prompt in progress still needs for its known tokens behind the next ``planned`` of them."""
        rest = self.kv.blocks_to_grow(resident.request_id, resident.num_tokens)
        rest -= self.kv.blocks_to_grow(resident.request_id, resident.num_computed_tokens + planned)
        return min(rest, self.peak_blocks(resident))

    def peak_blocks(self, request: RequestView) -> int:
        """Most blocks a request's known tokens ever hold: with a sliding window, fewer than their number needs."""
        return self.kv.peak_blocks(request.num_tokens, self.limits.max_num_batched_tokens)

    def blocks_to_end(self, request: RequestView) -> int:
        """Most blocks it ever holds if it grows as long as it may; its last token is sampled and never computed."""
        return self.kv.peak_blocks(request.max_total_tokens - 1, self.limits.max_num_batched_tokens)

    def lacking_resource(self, request: RequestView) -> str | None:
        """The first resource that has too little left for one more such request in this pass."""
        return self._resources.shortage(request)

    def set_aside_resources(self, request: RequestView) -> None:
        """Count the request in ``lacking_resource`` although it does not start now: for a policy that chooses several
        who start later."""
        self._resources.reserve(request)

    def forget_set_aside(self) -> None:
        """What was set aside is to be had again. Before anybody is started."""
        assert not self.admitted, "what they need would be forgotten too"
        self._resources.begin_pass()

    def first_new_block(self, request: RequestView, num_tokens: int) -> BlockHash | None:
        """The hash of the full block that holds position ``num_tokens``; ``None`` where the prompt does not fill it, or
        may not find it."""
        hashes, index = request.block_hashes, num_tokens // self.kv.block_size
        return hashes[index] if index < len(hashes) and request.reads_prefix_cache else None

    def _promise_to_admitted(self, request: RequestView, planned: int) -> int:
        reached = self.prefix(request).num_tokens + planned
        rest = self.kv.blocks_for(request.num_tokens) - self.kv.blocks_for(reached)
        return min(rest, self.peak_blocks(request))

    def _add(self, request: RequestView, start: int, num_tokens: int) -> None:
        self._chunked.append(request)
        self._chunk_ends.append(start + num_tokens)
        self.plan.chunk_ids.append(request.request_id)
        self.plan.chunk_tokens.append(num_tokens)
        self.tokens_left -= num_tokens
        self.rows_left -= 1
