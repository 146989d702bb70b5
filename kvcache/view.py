"""What a scheduler may know of the KV cache, with a running total for the plan it is making."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.request import BlockHash
from .kv_cache_manager import KVCacheManager
from .prefix_cache import PrefixMatch
from .prefix_memory import PrefixMemory


class KVView:
    """Read-only: nothing here changes the manager. Under the same lock as the manager.

    Between ``begin_pass`` and the plan's end it keeps a simulation, so that a plan whose requests each fit into
    ``free_blocks`` when they were reserved can be carried out: frees first, then starts, then growth. It errs on one
    side only: what is predicted is never less than what is taken.

    Sharing makes that delicate, since who holds a block can change within a pass. A start that counts on a block held
    by another *claims* it: pausing the holder, or its window passing the block, does not hand it back in this pass.
    The other way round, a block that was handed back in this pass costs a start as much as a free one.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._balance = 0
        """Blocks released less blocks reserved in this pass."""
        self._holders: dict[int, int] = {}
        """Change of a block's holders in this pass."""
        self._claimed: set[int] = set()
        self._handed_back: set[int] = set()
        self._matches = PrefixMemory(manager)

    def begin_pass(self) -> None:
        """Forget the simulation; called before each scheduling pass."""
        self._balance = 0
        self._holders.clear()
        self._claimed.clear()
        self._handed_back.clear()

    # -- what does not depend on the pass

    @property
    def block_size(self) -> int:
        return self._manager.block_size

    @property
    def num_usable_blocks(self) -> int:
        return self._manager.num_usable_blocks

    @property
    def usage(self) -> float:
        """Share of the usable blocks held before this pass, 0 to 1."""
        return self._manager.usage

    def blocks_for(self, num_tokens: int, num_computed: int = 0) -> int:
        """See ``KVCacheManager.blocks_for``."""
        return self._manager.blocks_for(num_tokens, num_computed)

    def peak_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """See ``KVCacheManager.peak_blocks``."""
        return self._manager.peak_blocks(num_tokens, max_chunk)

    def num_held(self, seq_id: int) -> int:
        """Blocks the sequence held before this pass."""
        return self._manager.num_held(seq_id)

    @property
    def shared_blocks(self) -> int:
        """Blocks that sharing saves, before this pass, until a holder ends: each block's holders but one. With a window
        none counts, since a holder may let go of its share and go on growing."""
        return 0 if self._manager.layout.sliding_window is not None else self._manager.pool.num_shares

    def prefix(self, request_id: int, hashes: Sequence[BlockHash], num_tokens: int) -> PrefixMatch:
        """What the request would find if it started now; cheap to ask again."""
        return self._matches.match(request_id, hashes, num_tokens)

    def forget(self, request_id: int) -> None:
        """The request started or ended: its match is not needed any more."""
        self._matches.forget(request_id)

    # -- the running total

    @property
    def free_blocks(self) -> int:
        """Free before the pass, less what it reserved, and what it released. Negative if it reserved more than that."""
        return self._manager.num_free_blocks + self._balance

    def blocks_to_start(self, match: PrefixMatch, num_tokens: int, *, claim: bool = True) -> int:
        """Blocks that leave the free list when a sequence with this match starts and is grown to ``num_tokens`` tokens:
        new ones, and those of its hit that nobody holds.

        Without ``claim`` the answer holds only until somebody is paused or a window passes.
        """
        new = max(0, -(-(num_tokens - match.num_tokens) // self.block_size))
        held = self._held_of(match)
        if claim:
            self._claimed.update(held)
        return new + match.num_blocks - len(held)

    def shared_by(self, match: PrefixMatch) -> int:
        """By how much ``shared_blocks`` grows when a sequence with this match starts."""
        return 0 if self._manager.layout.sliding_window is not None else len(self._held_of(match))

    def blocks_to_grow(self, seq_id: int, num_tokens: int, num_computed: int | None = None) -> int:
        """Blocks that leave the free list when the sequence grows; see ``KVCacheManager.grow`` for the arguments.

        The plan must grow it with the same ``num_computed`` or a higher one.
        """
        needed = self._manager.new_blocks(seq_id, num_tokens)
        if not needed:
            return 0
        for block in self._manager.passed_blocks(seq_id, num_computed):
            if self._is_last_holder(block):
                self._handed_back.add(block)
                needed -= 1
        return max(0, needed)

    def blocks_to_advance(self, seq_ids: Sequence[int]) -> int:
        """Blocks that leave the free list when each of these decodes opens a block. Costs nothing without a window."""
        if self._manager.layout.sliding_window is None:
            return len(seq_ids)
        return sum(self.blocks_to_grow(seq_id, *self._manager.next_block(seq_id)) for seq_id in seq_ids)

    def reserve(self, num_blocks: int, match: PrefixMatch | None = None) -> None:
        """The plan takes these blocks. With the ``match`` of a start its hit counts as held from now on, so that the
        next start that shares it is not charged again."""
        self._balance -= num_blocks
        if match is not None:
            for block in match.block_ids:
                self._holders[block] = self._holders.get(block, 0) + 1
                self._handed_back.discard(block)

    def release(self, seq_id: int) -> int:
        """The plan pauses this sequence, once in a pass: adds the blocks that come free to the total, and returns their
        number. A shared block comes free with its last holder."""
        freed = 0
        for block in self._manager.held_blocks(seq_id):
            if self._is_last_holder(block):
                self._handed_back.add(block)
                freed += 1
            self._holders[block] = self._holders.get(block, 0) - 1
        self._balance += freed
        return freed

    def would_release(self, seq_ids: Sequence[int], match: PrefixMatch) -> list[int]:
        """What ``release`` of these sequences in turn would add to the total: after the first, the first two, ... With
        the hit of ``match`` claimed. Changes nothing."""
        ref_counts, claimed = self._manager.pool.ref_counts, self._claimed.union(match.block_ids)
        let_go: dict[int, int] = {}
        freed, totals = 0, []
        for seq_id in seq_ids:
            for block in self._manager.held_blocks(seq_id):
                let_go[block] = let_go.get(block, 0) + 1
                holders = ref_counts[block] + self._holders.get(block, 0)
                freed += holders == let_go[block] and block not in claimed
            totals.append(freed)
        return totals

    def _held_of(self, match: PrefixMatch) -> list[int]:
        """Blocks of the hit that somebody holds, or holds after this pass."""
        ref_counts, holders, handed_back = self._manager.pool.ref_counts, self._holders, self._handed_back
        return [b for b in match.block_ids if b not in handed_back and (ref_counts[b] or b in holders)]

    def _is_last_holder(self, block: int) -> bool:
        """Whether the block comes free when one more holder lets go of it."""
        holders = self._manager.pool.ref_counts[block] + self._holders.get(block, 0)
        return holders == 1 and block not in self._claimed
