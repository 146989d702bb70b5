"""Blocks by number: who is free, in which order they are given out again, and how many holders the others have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

NULL_BLOCK = 0
"""Stands in a table where no block is needed; never given out, never written by a query that anyone reads."""
MAX_PRIORITY = 100
DEFAULT_PRIORITY = 35


class OutOfBlocks(AssertionError):
    """More blocks were asked for than are free. Plans are checked before blocks are taken, so this is a bug of ours."""

    def __init__(self, needed: int, free: int) -> None:
        self.needed, self.free = needed, free
        super().__init__(f"{needed} KV blocks needed, {free} free")


class BlockPool:
    """Reference counts and the free list. Under the owner's lock; every operation is O(1) per block.

    A free block may still hold tokens worth finding again, so the free list is kept in the order in which blocks are to
    be lost: by retention priority, the lowest first, and within one priority by the time they were freed. It is one
    circular list per priority through two arrays of links; entry ``num_blocks + p`` of the arrays is the head of the
    list for priority ``p``, and a bit mask says which lists are not empty. ``take`` pops from the head of the first
    list, ``free`` appends to the tail: whoever frees a sequence's blocks *last block first* loses its tail, which few
    others share, before its head.

    A block with nothing in it has priority 0, and so has every block that was just taken.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "one block beside the null block"
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.ref_counts = [0] * num_blocks
        """Holders of each block; read by others, changed here."""
        self.num_shares = 0
        """Holders that blocks have beyond their first, summed over all blocks."""
        self._priorities = [0] * num_blocks
        self._next = list(range(num_blocks + MAX_PRIORITY + 1))
        self._prev = list(range(num_blocks + MAX_PRIORITY + 1))
        self._filled = 0
        """Bit ``p`` is set when the list for priority ``p`` is not empty."""
        for block in range(1, num_blocks):
            self._append(block)

    def take_one(self) -> int:
        """The next block to be lost, now with one holder; raises ``OutOfBlocks``."""
        filled = self._filled
        if not filled:
            raise OutOfBlocks(1, 0)
        following = self._next
        head = self.num_blocks + (filled & -filled).bit_length() - 1
        block = following[head]
        after = following[block]
        following[head] = after
        self._prev[after] = head
        if after == head:
            self._filled = filled & (filled - 1)
        self._priorities[block] = 0
        self.ref_counts[block] = 1
        self.num_free -= 1
        return block

    def take(self, count: int) -> list[int]:
        """``count`` blocks with one holder each, in the order they would have been lost; where there are fewer, raises
        ``OutOfBlocks`` and takes none."""
        if count > self.num_free:
            raise OutOfBlocks(count, self.num_free)
        return [self.take_one() for _ in range(count)]

    def touch(self, blocks: Iterable[int]) -> None:
        """One more holder for each; a free one leaves the free list with what it holds."""
        ref_counts = self.ref_counts
        for block in blocks:
            assert block != NULL_BLOCK
            if ref_counts[block] == 0:
                self._unlink(block)
                self.num_free -= 1
            else:
                self.num_shares += 1
            ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One holder less for each; without holders they join the free list in the order given."""
        ref_counts = self.ref_counts
        for block in blocks:
            left = ref_counts[block] - 1
            assert left >= 0, f"block {block} has no holder"
            ref_counts[block] = left
            if left == 0:
                self._append(block)
                self.num_free += 1
            else:
                self.num_shares -= 1

    def priority(self, block: int) -> int:
        return self._priorities[block]

    def set_priority(self, block: int, priority: int) -> None:
        """From now on the block is kept with this priority, 0..100; a free one moves to the end of that list."""
        assert 0 <= priority <= MAX_PRIORITY
        if self._priorities[block] == priority:
            return
        if self.ref_counts[block] == 0:
            self._unlink(block)
            self._priorities[block] = priority
            self._append(block)
        else:
            self._priorities[block] = priority

    def free_blocks(self) -> Iterator[int]:
        """Free blocks in the order they will be given out."""
        for head in range(self.num_blocks, self.num_blocks + MAX_PRIORITY + 1):
            block = self._next[head]
            while block != head:
                yield block
                block = self._next[block]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where links, counts, priorities and mask disagree."""
        seen = 0
        for priority in range(MAX_PRIORITY + 1):
            head = self.num_blocks + priority
            assert (self._next[head] != head) == bool(self._filled >> priority & 1), f"mask of priority {priority}"
            at = head
            while True:
                assert self._prev[self._next[at]] == at, f"links at {at}"
                at = self._next[at]
                if at == head:
                    break
                assert 0 < at < self.num_blocks, f"{at} in the free list"
                assert self.ref_counts[at] == 0, f"block {at} is held and in the free list"
                assert self._priorities[at] == priority, f"block {at} in the list of priority {priority}"
                seen += 1
                assert seen < self.num_blocks, "the free list does not end"
        assert seen == self.num_free == sum(count == 0 for count in self.ref_counts) - 1
        assert self.ref_counts[NULL_BLOCK] == min(self.ref_counts) == 0
        assert self.num_shares == sum(count - 1 for count in self.ref_counts if count)

    def _append(self, block: int) -> None:
        priority = self._priorities[block]
        head = self.num_blocks + priority
        last = self._prev[head]
        self._next[last] = self._prev[head] = block
        self._next[block], self._prev[block] = head, last
        self._filled |= 1 << priority

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        if before == after:  # only the head of a list is on both sides of its only block
            self._filled &= ~(1 << self._priorities[block])
