"""The only door to the KV cache's books: sequence ids, token counts and hashes in; block ids and counts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..core.errors import ConfigError, KVCacheError
from ..core.request import BlockHash
from .block_layout import BlockLayout
from .block_pool import DEFAULT_PRIORITY, MAX_PRIORITY, NULL_BLOCK, BlockPool, OutOfBlocks
from .prefix_cache import PrefixCache, PrefixMatch
from .sequence_blocks import SequenceBlocks

__all__ = ["KVCacheManager", "OutOfBlocks", "PrefixMatch"]


_NOTHING = PrefixMatch()


class KVCacheManager:
    """Who holds which block. It has no thread and no lock: every call, reads too, is made under the caller's lock.

    ``sliding_window`` is given only when *every* layer has a window, and is the widest: a query at position p sees
    positions p - window + 1 to p. Blocks that no later query can see are given back as the sequence grows, and the null
    block takes their place in the table. That is safe although steps are in flight: steps execute in order, and in the
    step whose growth lets a block go the sequence does not look at it any more.

    Within one plan, sequences must be freed first, then added, then grown: an ``add_sequence`` that came after
    growth could find its hit evicted by it.

    A subclass may override ``retention`` to say what is lost first, and ``__init__`` if it calls this one; the counts
    that schedulers plan with do not depend on either. It is made with the arguments of this constructor.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        sliding_window: int | None = None,
    ) -> None:
        if num_blocks < 2:
            raise ConfigError("num_kv_blocks", num_blocks, "2 or more (block 0 is reserved)")
        self.layout = BlockLayout(block_size, sliding_window)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        """For reading; changed only here."""
        self.cache = PrefixCache(num_blocks)
        """For reading; changed only here."""
        self.evictions = 0
        """Published blocks that were taken for other tokens."""
        self.resumed_prefix_queries = 0
        self.resumed_prefix_hits = 0
        """As ``prefix_queries`` and ``prefix_hits``, for sequences that resume after a pause."""
        self._sequences: dict[int, SequenceBlocks] = {}

    # -- counts

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def num_usable_blocks(self) -> int:
        """All blocks but the null block."""
        return self.pool.num_blocks - 1

    @property
    def usage(self) -> float:
        """Share of the usable blocks that somebody holds, 0 to 1."""
        return (self.num_usable_blocks - self.pool.num_free) / self.num_usable_blocks

    @property
    def prefix_queries(self) -> int:
        """Tokens of sequences that looked for a prefix when they first started."""
        return self.cache.queries

    @property
    def prefix_hits(self) -> int:
        """Tokens those sequences found."""
        return self.cache.hits

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._sequences

    def block_ids(self, seq_id: int) -> list[int]:
        """A copy of the sequence's table, in token order, null blocks where the window has passed."""
        return self._sequences[seq_id].table.copy()

    def num_held(self, seq_id: int) -> int:
        """Blocks the sequence holds, null blocks not counted."""
        sequence = self._sequences[seq_id]
        return len(sequence.table) - sequence.num_passed

    def held_blocks(self, seq_id: int) -> list[int]:
        """The blocks the sequence holds, in token order."""
        return self._sequences[seq_id].held()

    # -- estimates

    def blocks_for(self, num_tokens: int, num_computed: int = 0) -> int:
        """Most blocks a sequence holds at one time when, with ``num_computed`` tokens computed, it computes the others
        up to ``num_tokens`` in one step."""
        return self.layout.blocks_for(num_tokens, num_computed)

    def peak_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """Most blocks a sequence ever holds on its way to ``num_tokens``, computing at most ``max_chunk`` a step."""
        return self.layout.peak_blocks(num_tokens, max_chunk)

    def match_prefix(self, hashes: Sequence[BlockHash], num_tokens: int, known: PrefixMatch = _NOTHING) -> PrefixMatch:
        """What a sequence with these hashes and ``num_tokens`` known tokens would find; changes and counts nothing.
        ``known``: an earlier answer for it that still stands, to go on from.

        At least the last token is left to compute, since its logits are wanted; a hit is whole blocks, so a sequence
        found entirely computes its last block again.
        """
        if not self.enable_prefix_caching:
            return PrefixMatch()
        num_found, blocks = self._find(hashes, num_tokens, known.block_ids)
        return PrefixMatch(num_found * self.block_size, len(blocks), tuple(blocks))

    def new_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Blocks that must be appended to the table for ``num_tokens`` tokens."""
        return max(0, self.layout.blocks(num_tokens) - len(self._sequences[seq_id].table))

    def next_block(self, seq_id: int) -> tuple[int, int]:
        """``(num_tokens, num_computed)`` of a decode whose next token opens a block."""
        position = len(self._sequences[seq_id].table) * self.block_size
        return position + 1, position

    def passed_blocks(self, seq_id: int, num_computed: int | None = None) -> list[int]:
        """Blocks the next ``grow`` lets go because the window has passed them."""
        return self._sequences[seq_id].passed(self.layout, num_computed)

    def blocks_to_grow(self, seq_id: int, num_tokens: int, num_computed: int | None = None) -> int:
        """By how many blocks ``grow`` with these arguments lessens the free ones now; 0 where it frees as many."""
        needed = self.new_blocks(seq_id, num_tokens)
        if needed:
            needed -= self._num_last_held(self.passed_blocks(seq_id, num_computed))
        return max(0, needed)

    def blocks_to_advance(self, seq_ids: Sequence[int]) -> int:
        """By how many blocks the free ones lessen at most when each of these decodes grows by one."""
        if self.layout.sliding_window is None:
            return len(seq_ids)
        return sum(self.blocks_to_grow(seq_id, *self.next_block(seq_id)) for seq_id in seq_ids)

    # -- what is lost first

    def retention(self, seq_id: int, index: int, *, found: bool) -> int:
        """How long a sequence's block is kept once nobody holds it: 0..100, the lowest is taken first, and within one
        number what was freed longest ago. To be overridden; it changes nothing.

        ``index``: which block of the sequence, from 0. ``found``: whether the sequence found it in the cache; else its
        own tokens have just filled it. The latest answer for a block counts.
        """
        return self._sequences[seq_id].priority

    # -- changes

    def add_sequence(
        self,
        seq_id: int,
        hashes: Sequence[BlockHash],
        num_tokens: int,
        *,
        read_prefix: bool = True,
        resumed: bool = False,
        retention_priority: int = DEFAULT_PRIORITY,
    ) -> int:
        """Register a sequence of ``num_tokens`` known tokens and hold what ``match_prefix`` finds for it.

        Returns how many tokens need no computing. ``resumed`` counts it apart, so that recomputing after a pause does
        not embellish the hit rate. ``retention_priority`` (0..100; lower is lost earlier) is given to the blocks it
        finds and publishes; where sequences differ, the latest decides. Raises ``KVCacheError`` where ``retention``
        breaks, and then holds nothing.
        """
        assert seq_id not in self._sequences, f"sequence {seq_id} is held already"
        num_found, blocks = 0, list[int]()
        if read_prefix and self.enable_prefix_caching:
            num_found, blocks = self._find(hashes, num_tokens)
            self._count(num_tokens, num_found * self.block_size, resumed)
        last_step = None
        if blocks:
            self.pool.touch(blocks)
            last_step = max(map(self.cache.step_of.__getitem__, blocks))
        num_passed = num_found - len(blocks)
        self._sequences[seq_id] = SequenceBlocks(
            table=[NULL_BLOCK] * num_passed + blocks,
            num_tokens=num_found * self.block_size,
            num_published=num_found,
            num_passed=num_passed,
            last_step=last_step,
            priority=retention_priority,
            may_publish=self.enable_prefix_caching,
        )
        try:
            self._keep(seq_id, range(num_passed, num_found), found=True)
        except KVCacheError:
            self.free(seq_id)
            raise
        return num_found * self.block_size

    def grow(self, seq_id: int, num_tokens: int, num_computed: int | None = None) -> list[int]:
        """Make the table reach ``num_tokens`` tokens; returns the blocks appended, in token order.

        ``num_computed``: the position the step computes first, needed only to free window-passed blocks at the earliest
        (default: what the table was grown for before). Raises ``OutOfBlocks`` and then changes nothing.
        """
        sequence = self._sequences[seq_id]
        needed = self.new_blocks(seq_id, num_tokens)
        passed = sequence.passed(self.layout, num_computed)
        if passed:
            available = self.pool.num_free + self._num_last_held(passed)
            if needed > available:
                raise OutOfBlocks(needed, available)
            sequence.let_go(len(passed))
            self.pool.free(passed)
        taken = self.pool.take(needed)
        for block in taken:
            if self.cache.hash_of[block] is not None:
                self._evict(block)
        sequence.table += taken
        sequence.num_tokens = max(sequence.num_tokens, num_tokens)
        return taken

    def grow_by_one(self, seq_id: int) -> int:
        """``grow`` for a decode whose next position opens a block: appends one block and returns it."""
        if self.layout.sliding_window is not None:
            return self.grow(seq_id, *self.next_block(seq_id))[0]
        sequence = self._sequences[seq_id]
        block = self.pool.take_one()
        if self.cache.hash_of[block] is not None:
            self._evict(block)
        table = sequence.table
        sequence.num_tokens = len(table) * self.block_size + 1
        table.append(block)
        return block

    def publish(self, seq_id: int, hashes: Sequence[BlockHash], num_tokens: int, step: int) -> None:
        """The full blocks among the first ``num_tokens`` tokens can be found under these hashes from now on.

        Called when ``step``, which computes the last of these tokens, is pushed: whoever finds the blocks reads them in
        a later step. Blocks that ``hashes`` does not reach yet wait for a later call; without prefix caching it does
        nothing. Raises ``KVCacheError`` where ``retention`` breaks; they can be found all the same.
        """
        sequence = self._sequences[seq_id]
        first, stop = sequence.num_published, min(num_tokens // self.block_size, len(hashes))
        if first >= stop or not sequence.may_publish:
            return
        assert stop <= len(sequence.table), f"sequence {seq_id} has no blocks for {num_tokens} tokens"
        filled = range(max(first, sequence.num_passed), stop)
        for index in filled:
            self.cache.publish(sequence.table[index], hashes[index], step)
        sequence.num_published = stop
        sequence.last_step = step if sequence.last_step is None else max(sequence.last_step, step)
        self._keep(seq_id, filled, found=False)

    def free(self, seq_id: int) -> None:
        """Let go of the sequence's blocks, last block first; what they hold can still be found until they are taken.

        Raises ``KeyError`` for an id that is not held: nothing is freed twice.
        """
        sequence = self._sequences.pop(seq_id)
        held = sequence.held()
        held.reverse()
        self.pool.free(held)

    def withdraw(self, step: int) -> list[int]:
        """Forget every hash that ``step`` or a later step published, since these steps failed.

        Returns, ascending, the ids of all sequences that found or published such a block, even if the window has passed
        it since: what they computed after it is not to be trusted. Until they are freed they publish nothing more and
        stay listed.
        """
        for block in self.cache.withdraw(step):
            self.pool.set_priority(block, 0)
        hit = sorted(i for i, s in self._sequences.items() if s.last_step is not None and s.last_step >= step)
        for seq_id in hit:
            self._sequences[seq_id].may_publish = False
        return hit

    def reset_prefix_cache(self) -> None:
        """Forget every hash. Sequences keep their blocks, and publish nothing more: what they compute from now on rests
        on what was forgotten."""
        for block in self.cache.clear():
            self.pool.set_priority(block, 0)
        for sequence in self._sequences.values():
            sequence.may_publish = False

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where tables, counts, free list and hashes disagree. Costs O(blocks)."""
        self.pool.check_integrity()
        self.cache.check_integrity()
        holders: Counter[int] = Counter()
        for sequence in self._sequences.values():
            sequence.check_integrity(self.layout)
            holders.update(sequence.held())
        assert all(holders[block] == count for block, count in enumerate(self.pool.ref_counts))
        assert self.pool.num_free + len(holders) == self.num_usable_blocks
        for block, block_hash in enumerate(self.cache.hash_of):
            assert block_hash is not None or self.pool.priority(block) == 0, f"block {block} is empty but kept"

    def _keep(self, seq_id: int, indices: Iterable[int], *, found: bool) -> None:
        table, set_priority = self._sequences[seq_id].table, self.pool.set_priority
        for index in indices:
            try:
                priority = self.retention(seq_id, index, found=found)
            except (Exception, SystemExit) as error:
                raise KVCacheError(f"{type(self).__name__}.retention raised {error!r}") from error
            if type(priority) is not int or not 0 <= priority <= MAX_PRIORITY:
                raise KVCacheError(f"{type(self).__name__}.retention is {priority!r}; allowed: 0 to {MAX_PRIORITY}")
            set_priority(table[index], priority)

    def _find(self, hashes: Sequence[BlockHash], num_tokens: int, known: Sequence[int] = ()) -> tuple[int, list[int]]:
        """Blocks found, and those of them that must be held; ``known``: the first of them, where they are known."""
        max_blocks = (num_tokens - 1) // self.block_size
        if self.layout.window_span is not None:
            return self.cache.match_window(hashes, max_blocks, self.layout.window_span)
        blocks = self.cache.match(hashes, max_blocks, known)
        return len(blocks), blocks

    def _count(self, queried: int, found: int, resumed: bool) -> None:
        if resumed:
            self.resumed_prefix_queries += queried
            self.resumed_prefix_hits += found
        else:
            self.cache.queries += queried
            self.cache.hits += found

    def _num_last_held(self, blocks: list[int]) -> int:
        ref_counts = self.pool.ref_counts
        return sum(ref_counts[block] == 1 for block in blocks)

    def _evict(self, block: int) -> None:
        self.cache.forget(block)
        self.evictions += 1
