"""Which blocks hold which tokens: hashes to blocks, blocks to hashes, and the step that fills each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..core.request import BlockHash
from .block_pool import NULL_BLOCK

Change = TypeVar("Change")


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What a sequence would find in the cache now. Valid until blocks are next taken, published or withdrawn."""

    num_tokens: int = 0
    """Tokens that need no computing; a multiple of the block size."""
    num_blocks: int = 0
    """Blocks the sequence would hold of them: all, or those inside the sliding window."""
    block_ids: tuple[int, ...] = field(default=(), repr=False)
    """The ``num_blocks`` blocks, in token order."""


class Changes(Generic[Change]):
    """The last changes of one kind, and how many there ever were, for whoever looks in from time to time."""

    _MOST_KEPT = 1024

    def __init__(self) -> None:
        self.total = 0
        self._kept: list[Change] = []

    def add(self, change: Change) -> None:
        self.total += 1
        self._kept.append(change)
        if len(self._kept) >= 2 * self._MOST_KEPT:
            del self._kept[: self._MOST_KEPT]

    def add_untold(self, count: int) -> None:
        """So many that are not listed."""
        self.total += count
        self._kept.clear()

    def since(self, total: int) -> list[Change] | None:
        """Those after the first ``total``; ``None`` where they are not kept any more."""
        count = self.total - total
        return self._kept[len(self._kept) - count :] if count <= len(self._kept) else None


class PrefixCache:
    """Published hashes. Under the owner's lock. It knows nothing of holders or of the free list."""

    def __init__(self, num_blocks: int) -> None:
        self.hash_of: list[BlockHash | None] = [None] * num_blocks
        """Hash each block carries; read by others, changed here."""
        self.step_of = [0] * num_blocks
        """For a block that carries a hash: the step whose micro-batch writes it."""
        self._blocks: dict[BlockHash, list[int]] = {}
        self.lost: Changes[int] = Changes()
        """Blocks that carry their hash no more."""
        self.published: Changes[BlockHash] = Changes()
        """Hashes that no block carried before."""
        self.queries = 0
        """Tokens looked up since the start."""
        self.hits = 0
        """Tokens found since the start."""

    def __len__(self) -> int:
        """Number of different hashes."""
        return len(self._blocks)

    def publish(self, block: int, block_hash: BlockHash, step: int) -> None:
        """``block`` carries this hash from now on; other blocks may carry it as well."""
        assert block != NULL_BLOCK
        assert self.hash_of[block] is None, f"block {block} carries a hash already"
        self.hash_of[block] = block_hash
        self.step_of[block] = step
        blocks = self._blocks.get(block_hash)
        if blocks is not None:
            blocks.append(block)
            return
        self._blocks[block_hash] = [block]
        self.published.add(block_hash)

    def forget(self, block: int) -> bool:
        """The block's tokens are lost or not to be trusted; says whether it carried a hash."""
        block_hash = self.hash_of[block]
        if block_hash is None:
            return False
        self.hash_of[block] = None
        self.lost.add(block)
        blocks = self._blocks[block_hash]
        blocks.remove(block)
        if not blocks:
            del self._blocks[block_hash]
        return True

    def get(self, block_hash: BlockHash) -> int | None:
        """The block that has carried this hash for longest."""
        blocks = self._blocks.get(block_hash)
        return blocks[0] if blocks else None

    def match(self, hashes: Sequence[BlockHash], max_blocks: int, known: Sequence[int] = ()) -> list[int]:
        """Blocks for the longest run of hashes from the first one on, ``max_blocks`` at most; ``known``: those of the
        first ones, where they are known."""
        found = list(known)
        for index in range(len(found), min(max_blocks, len(hashes))):
            blocks = self._blocks.get(hashes[index])
            if blocks is None:
                break
            found.append(blocks[0])
        return found

    def match_window(self, hashes: Sequence[BlockHash], max_blocks: int, span: int) -> tuple[int, list[int]]:
        """``(n, blocks)`` for the largest n such that the last ``span`` of the first n hashes (all, if n is smaller)
        are there: what a sequence needs that looks back over ``span`` blocks only. ``blocks`` are those of that run."""
        run: list[int] = []
        for index in reversed(range(min(max_blocks, len(hashes)))):
            block = self.get(hashes[index])
            if block is None:
                run.clear()
                continue
            run.append(block)
            if len(run) == span or index == 0:
                return index + len(run), run[::-1]
        return 0, []

    def withdraw(self, step: int) -> list[int]:
        """Forget every hash that this step or a later one published; returns their blocks in ascending order."""
        blocks = [b for b, h in enumerate(self.hash_of) if h is not None and self.step_of[b] >= step]
        for block in blocks:
            self.forget(block)
        return blocks

    def clear(self) -> list[int]:
        """Forget every hash; returns their blocks in ascending order. The counters stay."""
        blocks = [block for block, block_hash in enumerate(self.hash_of) if block_hash is not None]
        for block in blocks:
            self.hash_of[block] = None
        self._blocks.clear()
        self.lost.add_untold(len(blocks))
        return blocks

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless the two maps are each other's inverse."""
        listed = [(block, block_hash) for block_hash, blocks in self._blocks.items() for block in blocks]
        assert all(self._blocks.values()), "a hash without blocks"
        assert sorted(listed) == [(b, h) for b, h in enumerate(self.hash_of) if h is not None]
        assert self.hash_of[NULL_BLOCK] is None
        assert 0 <= self.hits <= self.queries
