"""The block pool: eviction order, reference counts, retention priority."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_engine.kvcache.block_pool import BlockPool, OutOfBlocks


def test_the_null_block_is_never_given_out():
    pool = BlockPool(4)
    assert pool.take(3) == [1, 2, 3]
    with pytest.raises(OutOfBlocks):
        pool.take_one()


def test_least_recently_freed_is_given_out_first():
    pool = BlockPool(5)
    pool.take(4)
    for block in (3, 1, 4, 2):
        pool.free([block])
    assert pool.take(4) == [3, 1, 4, 2]


def test_a_sequence_freed_tail_first_loses_its_tail_first():
    pool = BlockPool(6)
    table = pool.take(3)
    pool.free(reversed(table))
    assert list(pool.free_blocks()) == [4, 5, *reversed(table)]


def test_a_shared_block_comes_free_with_its_last_holder():
    pool = BlockPool(3)
    (block,) = pool.take(1)
    pool.touch([block])
    pool.free([block])
    assert (pool.num_free, pool.ref_counts[block]) == (1, 1)
    pool.free([block])
    assert (pool.num_free, pool.ref_counts[block]) == (2, 0)


def test_touch_takes_a_free_block_out_of_the_middle():
    pool = BlockPool(5)
    pool.touch([2])
    assert list(pool.free_blocks()) == [1, 3, 4]
    assert pool.ref_counts[2] == 1


def test_freeing_what_nobody_holds_is_caught():
    with pytest.raises(AssertionError, match="block 1 has no holder"):
        BlockPool(2).free([1])


def test_taking_too_many_takes_none():
    pool = BlockPool(3)
    with pytest.raises(OutOfBlocks) as raised:
        pool.take(3)
    assert (raised.value.needed, raised.value.free) == (3, 2)
    assert list(pool.free_blocks()) == [1, 2]


def test_lower_priority_is_lost_first_and_taking_resets_it():
    pool = BlockPool(5)
    pool.take(4)
    for block, priority in ((1, 100), (2, 35), (3, 35), (4, 10)):
        pool.set_priority(block, priority)
    pool.free([1, 2, 3, 4])
    assert list(pool.free_blocks()) == [4, 2, 3, 1]
    assert pool.take(2) == [4, 2]
    pool.free([4])
    assert list(pool.free_blocks()) == [4, 3, 1]
    pool.set_priority(1, 0)  # a free block changes lists
    assert list(pool.free_blocks()) == [4, 1, 3]
    pool.check_integrity()


def test_a_broken_link_is_found():
    pool = BlockPool(4)
    pool._next[2] = 1
    with pytest.raises(AssertionError):
        pool.check_integrity()


class PoolAgainstLists(RuleBasedStateMachine):
    """The model: one list per priority, one dict of counts."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9)
        self.free: list[tuple[int, int]] = [(0, block) for block in range(1, 9)]  # (priority, block)
        self.counts: dict[int, int] = {}
        self.priorities = dict.fromkeys(range(1, 9), 0)

    def order(self):
        return [block for _, block in sorted(self.free, key=lambda entry: entry[0])]  # stable

    @rule(count=st.integers(0, 9))
    def take(self, count):
        if count > len(self.free):
            with pytest.raises(OutOfBlocks):
                self.pool.take(count)
            return
        expected = self.order()[:count]
        assert self.pool.take(count) == expected
        for block in expected:
            self.free.remove((self.priorities[block], block))
            self.counts[block], self.priorities[block] = 1, 0

    @rule(blocks=st.lists(st.integers(1, 8), max_size=4))
    def touch(self, blocks):
        self.pool.touch(blocks)
        for block in blocks:
            if block not in self.counts:
                self.free.remove((self.priorities[block], block))
            self.counts[block] = self.counts.get(block, 0) + 1

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def release(self, data):
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.counts)), unique=True))
        self.pool.free(blocks)
        for block in blocks:
            self.counts[block] -= 1
            if not self.counts[block]:
                del self.counts[block]
                self.free.append((self.priorities[block], block))

    @rule(block=st.integers(1, 8), priority=st.sampled_from([0, 1, 35, 100]))
    def set_priority(self, block, priority):
        self.pool.set_priority(block, priority)
        if block not in self.counts and self.priorities[block] != priority:
            self.free.remove((self.priorities[block], block))
            self.free.append((priority, block))
        self.priorities[block] = priority

    @invariant()
    def same(self):
        self.pool.check_integrity()
        assert list(self.pool.free_blocks()) == self.order()
        assert self.pool.ref_counts == [self.counts.get(block, 0) for block in range(9)]
        assert all(self.pool.priority(block) == priority for block, priority in self.priorities.items())


TestPoolAgainstLists = PoolAgainstLists.TestCase
TestPoolAgainstLists.settings = settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True)
