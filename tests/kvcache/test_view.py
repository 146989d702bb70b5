"""The scheduler's view by decided examples; random plans are in test_kv_cache_properties.py."""

import pytest

from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.kvcache.prefix_cache import PrefixMatch
from llm_engine.kvcache.view import KVView


def hashes(tokens):
    return hash_blocks(list(tokens), 4)


def resident(kv, seq_id, tokens):
    known = hashes(tokens)
    kv.add_sequence(seq_id, known, len(tokens))
    kv.grow(seq_id, len(tokens))
    kv.publish(seq_id, known, len(tokens), step=1)


@pytest.fixture
def kv():
    return KVCacheManager(11, 4)


@pytest.fixture
def view(kv):
    return KVView(kv)


def test_it_tells_the_managers_sizes(kv, view):
    resident(kv, 1, range(9))
    assert (view.block_size, view.num_usable_blocks, view.usage, view.num_held(1)) == (4, 10, 0.3, 3)
    assert (view.blocks_for(9), view.peak_blocks(9, 4), view.free_blocks) == (3, 3, 7)


def test_a_pass_keeps_a_total_and_changes_nothing(kv, view):
    resident(kv, 1, range(9))
    view.reserve(5)
    assert view.free_blocks == 2
    assert view.release(1) == 3
    assert view.free_blocks == 5
    assert kv.num_free_blocks == 7
    view.begin_pass()
    assert view.free_blocks == 7


def test_growth_costs_new_blocks_only(kv, view):
    resident(kv, 1, range(9))
    assert [view.blocks_to_grow(1, n) for n in (9, 12, 13, 20)] == [0, 0, 1, 2]
    assert view.blocks_to_advance([1]) == 1


def test_a_start_pays_for_new_blocks_and_for_hits_that_nobody_holds(kv, view):
    resident(kv, 1, range(9))
    held = view.prefix(2, hashes(range(16)), 16)
    assert view.blocks_to_start(held, 16) == 2  # blocks 3 and 4 are new, two hits are held
    kv.free(1)
    free = view.prefix(2, hashes(range(16)), 16)
    assert held == free
    assert view.blocks_to_start(free, 16) == 4
    assert view.blocks_to_start(PrefixMatch(), 16) == 4


def test_a_shared_block_comes_free_with_its_last_holder(kv, view):
    resident(kv, 1, range(9))
    resident(kv, 2, range(9))
    assert (view.release(1), view.release(2)) == (1, 3)
    assert view.free_blocks == kv.num_usable_blocks


def test_a_hit_on_a_paused_sequence_costs_what_the_pause_brought(kv, view):
    resident(kv, 1, range(9))
    match = view.prefix(2, hashes(range(16)), 16)
    assert view.release(1) == 3
    assert view.blocks_to_start(match, 16) == 4


def test_a_pause_does_not_bring_back_what_a_start_counts_on(kv, view):
    resident(kv, 1, range(9))
    match = view.prefix(2, hashes(range(16)), 16)
    assert view.blocks_to_start(match, 16) == 2
    assert view.release(1) == 1  # its third block; the newcomer keeps the two others
    assert view.blocks_to_start(match, 16) == 2


def test_two_starts_that_share_a_free_hit_pay_for_it_once(kv, view):
    resident(kv, 1, range(9))
    kv.free(1)
    match = view.prefix(2, hashes(range(16)), 16)
    cost = view.blocks_to_start(match, 16)
    assert cost == 4
    view.reserve(cost, match)
    assert view.blocks_to_start(match, 16) == 2


def test_a_handed_back_hit_is_paid_for_once(kv, view):
    resident(kv, 1, range(9))
    match = view.prefix(2, hashes(range(16)), 16)
    view.release(1)
    view.reserve(view.blocks_to_start(match, 16), match)
    assert view.blocks_to_start(match, 16) == 2


def test_a_match_is_remembered_until_the_request_starts_or_ends(kv, view):
    resident(kv, 1, range(9))
    first = view.prefix(2, hashes(range(16)), 16)
    assert view.prefix(2, hashes(range(16)), 16) is first
    view.forget(2)
    view.forget(2)
    assert view.prefix(2, hashes(range(16)), 16) is not first


def test_growth_in_a_window_is_net_of_what_the_window_gives_back():
    kv = KVCacheManager(11, 4, sliding_window=6)
    view = KVView(kv)
    resident(kv, 1, range(12))
    assert (view.blocks_to_grow(1, 13, 12), view.blocks_to_advance([1])) == (0, 0)  # block 0 goes, block 3 comes
    view.begin_pass()
    match = view.prefix(2, hashes(range(7)), 7)
    assert (match.block_ids, view.blocks_to_start(match, 7)) == ((1,), 1)
    assert view.blocks_to_grow(1, 13, 12) == 1  # the newcomer counts on block 0
    view.begin_pass()
    assert view.blocks_to_grow(1, 13, 12) == 0
    assert view.blocks_to_start(match, 7) == 2
