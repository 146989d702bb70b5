"""The prefix cache: matching, duplicates, withdrawal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llm_engine.core.request import BlockHash
from llm_engine.kvcache.prefix_cache import PrefixCache

A, B, C, D = (BlockHash(letter) for letter in (b"a", b"b", b"c", b"d"))


def filled(*hashes, num_blocks=10):
    """Blocks 1, 2, ... carry the hashes, published by steps 1, 2, ..."""
    cache = PrefixCache(num_blocks)
    for block, block_hash in enumerate(hashes, start=1):
        if block_hash is not None:
            cache.publish(block, block_hash, step=block)
    return cache


def test_a_match_stops_at_the_first_miss():
    cache = filled(A, None, C)
    assert cache.match([A, B, C], 3) == [1]
    assert cache.match([B, C], 2) == []


def test_a_match_stops_where_it_is_told():
    assert filled(A, B, C).match([A, B, C], 2) == [1, 2]


def test_of_several_blocks_with_one_hash_the_oldest_answers():
    cache = filled(A, A, A)
    assert cache.get(A) == 1
    cache.forget(1)
    assert cache.get(A) == 2
    cache.publish(1, A, step=9)
    assert cache.get(A) == 2
    cache.check_integrity()


def test_forgetting_says_whether_there_was_something():
    cache = filled(A)
    assert [cache.forget(1), cache.forget(1), cache.get(A)] == [True, False, None]


def test_withdrawal_takes_a_step_and_all_after_it():
    cache = filled(A, B, A, D)
    assert cache.withdraw(3) == [3, 4]
    assert cache.match([A, B], 2) == [1, 2]
    assert cache.get(D) is None
    cache.check_integrity()


def test_clear_forgets_hashes_but_not_counters():
    cache = filled(A, None, C)
    cache.queries = 5
    assert cache.clear() == [1, 3]
    assert (len(cache), cache.queries) == (0, 5)
    cache.check_integrity()


def test_a_window_needs_only_the_end_of_the_chain():
    cache = filled(None, B, C, None)
    assert cache.match([A, B, C, D], 4) == []
    assert cache.match_window([A, B, C, D], 4, span=2) == (3, [2, 3])
    assert cache.match_window([A, B, C, D], 4, span=3) == (0, [])
    assert cache.match_window([B, C, D], 3, span=3) == (2, [2, 3])  # the chain's start needs no more


def test_disagreeing_maps_are_found():
    cache = filled(A)
    cache.hash_of[1] = B
    with pytest.raises(AssertionError):
        cache.check_integrity()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(present=st.lists(st.booleans(), max_size=9), limit=st.integers(0, 9), span=st.integers(1, 4))
def test_window_matching_against_its_definition(present, limit, span):
    hashes = [BlockHash(bytes([i])) for i in range(len(present))]
    cache = filled(*(h if there else None for h, there in zip(hashes, present, strict=True)))
    usable = [n for n in range(min(limit, len(present)) + 1) if all(present[max(0, n - span) : n])]
    n, blocks = cache.match_window(hashes, limit, span)
    assert n == max(usable)
    assert blocks == list(range(max(0, n - span) + 1, n + 1))


class CacheAgainstDict(RuleBasedStateMachine):
    """The model: an ordered dict from block to (hash, step)."""

    def __init__(self):
        super().__init__()
        self.cache = PrefixCache(8)
        self.model: dict[int, tuple[BlockHash, int]] = {}

    @rule(block=st.integers(1, 7), block_hash=st.sampled_from([A, B, C]), step=st.integers(0, 9))
    def publish(self, block, block_hash, step):
        if block not in self.model:
            self.cache.publish(block, block_hash, step)
            self.model[block] = block_hash, step

    @rule(block=st.integers(1, 7))
    def forget(self, block):
        assert self.cache.forget(block) == (self.model.pop(block, None) is not None)

    @rule(step=st.integers(0, 9))
    def withdraw(self, step):
        gone = sorted(block for block, (_, tag) in self.model.items() if tag >= step)
        assert self.cache.withdraw(step) == gone
        for block in gone:
            del self.model[block]

    @rule()
    def clear(self):
        assert self.cache.clear() == sorted(self.model)
        self.model.clear()

    @invariant()
    def same(self):
        self.cache.check_integrity()
        for block_hash in (A, B, C):
            assert self.cache.get(block_hash) == next((b for b, (h, _) in self.model.items() if h == block_hash), None)
        assert len(self.cache) == len({h for h, _ in self.model.values()})


TestCacheAgainstDict = CacheAgainstDict.TestCase
TestCacheAgainstDict.settings = settings(max_examples=100, stateful_step_count=20, deadline=None, derandomize=True)
