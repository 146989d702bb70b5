"""What is remembered of a waiting request's prefix, and when it is looked up again.

Random lives, in which requests look again and again, are in ``test_kv_cache_properties.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from llm_engine.core.request import BlockHash
from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.kvcache.prefix_cache import Changes, PrefixMatch
from llm_engine.kvcache.prefix_memory import PrefixMemory

NOTHING = PrefixMatch()


class Counting(KVCacheManager):
    """Counts the walks, and the blocks that each did not know before."""

    def __init__(self, *args: int, **more: int) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.walks: list[int] = []

    def match_prefix(self, hashes: Sequence[BlockHash], num_tokens: int, known: PrefixMatch = NOTHING) -> PrefixMatch:
        found = super().match_prefix(hashes, num_tokens, known)
        assert found == super().match_prefix(hashes, num_tokens)
        self.walks.append(found.num_blocks - known.num_blocks)
        return found


class Waiter:
    """One request that waits with these tokens."""

    def __init__(self, memory: PrefixMemory, request_id: int, tokens: Iterable[int]) -> None:
        self.memory, self.request_id, self.tokens = memory, request_id, list(tokens)

    def found(self) -> int:
        return self.memory.match(self.request_id, hash_blocks(self.tokens, 4), len(self.tokens)).num_tokens


def hold(kv: KVCacheManager, seq_id: int, tokens: Iterable[int], *, upto: int | None = None) -> None:
    known = list(tokens)
    if seq_id not in kv:
        kv.add_sequence(seq_id, (), len(known), read_prefix=False)
    reached = len(known) if upto is None else upto
    kv.grow(seq_id, reached)
    kv.publish(seq_id, hash_blocks(known, 4), reached, step=1)


def evict(kv: KVCacheManager, seq_id: int, num_blocks: int) -> None:
    """Somebody takes so many blocks."""
    kv.add_sequence(seq_id, (), 4 * num_blocks, read_prefix=False)
    kv.grow(seq_id, 4 * num_blocks)


@pytest.fixture
def kv() -> Counting:
    return Counting(21, 4)


@pytest.fixture
def memory(kv: Counting) -> PrefixMemory:
    return PrefixMemory(kv)


def test_what_does_not_concern_a_match_costs_no_walk(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(9))
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 8
    hold(kv, 3, range(100, 117))  # others publish
    kv.free(3)
    kv.free(1)  # its blocks can still be found
    evict(kv, 4, 16)  # blocks of others are lost
    assert kv.evictions > 0
    assert waiter.found() == 8
    assert kv.walks == [2]


def test_a_prompt_in_progress_is_followed_block_by_block(kv: Counting, memory: PrefixMemory) -> None:
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 0
    for reached, found in ((4, 4), (6, 4), (12, 12), (20, 20)):
        hold(kv, 1, range(20), upto=reached)
        assert waiter.found() == found
    assert kv.walks == [0, 1, 2, 2]  # each only what is new


def test_what_was_lost_is_looked_up_again(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(12))
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 12
    kv.free(1)
    evict(kv, 3, 18)  # the last block goes first
    assert waiter.found() == 8
    assert waiter.found() == 8
    assert kv.walks == [3, 2]


def test_a_block_with_the_same_hash_takes_a_lost_ones_place(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(8))
    hold(kv, 2, range(8))
    waiter = Waiter(memory, 3, range(30))
    assert waiter.found() == 8
    kv.free(1)
    evict(kv, 4, 18)
    assert waiter.found() == 8


def test_the_last_token_is_never_found(kv: Counting, memory: PrefixMemory) -> None:
    waiter = Waiter(memory, 2, range(8))
    assert waiter.found() == 0
    hold(kv, 1, range(8))
    assert waiter.found() == 4
    assert waiter.found() == 4
    assert kv.walks == [0, 1]


def test_more_known_tokens_are_looked_up(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(12))
    waiter = Waiter(memory, 2, range(8))
    assert waiter.found() == 4
    waiter.tokens = list(range(13))
    assert waiter.found() == 12


def test_a_cache_that_forgot_everything_is_walked_anew(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(12))
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 12
    kv.reset_prefix_cache()
    assert waiter.found() == 0


def test_a_failed_step_takes_its_blocks_back(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(12))
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 12
    kv.withdraw(1)
    assert waiter.found() == 0


def lose_very_much(kv: Counting) -> None:
    for turn in range(300):
        hold(kv, 10 + turn, range(1000 * turn + 100, 1000 * turn + 164))
        kv.free(10 + turn)


def test_after_very_much_was_lost_the_blocks_found_are_looked_at_one_by_one(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(12))
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 12
    lose_very_much(kv)
    assert waiter.found() == 12
    assert len(kv.walks) == 1


def test_after_very_much_was_lost_and_some_of_it_was_found_it_walks(kv: Counting, memory: PrefixMemory) -> None:
    hold(kv, 1, range(12))
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 12
    kv.free(1)
    lose_very_much(kv)
    assert waiter.found() == 0
    assert len(kv.walks) == 2


def test_without_a_cache_nothing_is_found(memory: PrefixMemory) -> None:
    kv = Counting(21, 4, enable_prefix_caching=False)
    hold(kv, 1, range(12))
    waiter = Waiter(PrefixMemory(kv), 2, range(30))
    assert (waiter.found(), waiter.found(), kv.walks) == (0, 0, [0])


def test_in_a_window_a_later_run_takes_the_place_of_an_earlier_one() -> None:
    kv = Counting(31, 4, sliding_window=9)  # a query sees two blocks before its own
    memory = PrefixMemory(kv)
    hold(kv, 1, range(20), upto=8)
    waiter = Waiter(memory, 2, range(30))
    assert waiter.found() == 8
    hold(kv, 3, range(100, 117))
    assert waiter.found() == 8
    assert len(kv.walks) == 1
    hold(kv, 1, range(20), upto=12)
    assert waiter.found() == 12
    hold(kv, 1, range(20), upto=20)
    assert waiter.found() == 20
    assert len(kv.walks) == 3


def test_however_many_wait_none_is_walked_twice(kv: Counting, memory: PrefixMemory) -> None:
    waiters = [Waiter(memory, number, [number] * 9) for number in range(1500)]
    for _ in range(2):
        assert sum(waiter.found() for waiter in waiters) == 0
    assert len(kv.walks) == len(memory) == 1500


def test_who_started_or_ended_is_forgotten(memory: PrefixMemory) -> None:
    for request_id in range(3):
        memory.match(request_id, [], 4)
    memory.forget(1)
    memory.forget(1)
    assert (len(memory), 1 in memory, 2 in memory) == (2, False, True)


def test_changes_are_kept_for_a_while() -> None:
    changes: Changes[int] = Changes()
    assert changes.since(0) == []
    for number in range(5000):
        changes.add(number)
        assert changes.since(changes.total) == []
        assert changes.since(number) == [number]
    assert changes.since(5000 - 1024) == list(range(5000 - 1024, 5000))
    assert changes.since(0) is None
    changes.add_untold(3)
    assert changes.since(5000) is None
    assert changes.since(5003) == []
