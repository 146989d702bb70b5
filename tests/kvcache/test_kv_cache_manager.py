"""The KV manager by decided examples; random operations are in test_kv_cache_properties.py."""

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.kvcache.block_hash import extra_key, hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager, OutOfBlocks, PrefixMatch


def hashes(tokens, extra=None):
    return hash_blocks(list(tokens), 4, extra=extra)


def run_prompt(kv, seq_id, tokens, *, step=1, extra=None, **options):
    """Add a sequence, compute its whole prompt, publish it; returns the tokens it found."""
    known = hashes(tokens, extra)
    found = kv.add_sequence(seq_id, known, len(tokens), **options)
    kv.grow(seq_id, len(tokens))
    kv.publish(seq_id, known, len(tokens), step)
    kv.check_integrity()
    return found


def test_a_table_grows_and_is_given_back():
    kv = KVCacheManager(6, 4)
    assert kv.add_sequence(7, [], 9) == 0
    assert kv.blocks_to_grow(7, 9) == 3
    assert kv.grow(7, 9) == [1, 2, 3]
    assert kv.grow(7, 12) == []  # room is left in the last block
    assert kv.grow_by_one(7) == 4
    assert (kv.block_ids(7), kv.num_held(7), kv.num_free_blocks, kv.usage) == ([1, 2, 3, 4], 4, 1, 0.8)
    kv.free(7)
    assert (kv.num_free_blocks, kv.num_usable_blocks, kv.usage) == (5, 5, 0.0)
    kv.check_integrity()


def test_nothing_is_freed_twice():
    kv = KVCacheManager(3, 4)
    kv.add_sequence(1, [], 4)
    kv.free(1)
    with pytest.raises(KeyError):
        kv.free(1)


def test_the_table_handed_out_is_a_copy():
    kv = KVCacheManager(3, 4)
    kv.add_sequence(1, [], 4)
    kv.grow(1, 4)
    kv.block_ids(1).append(99)
    assert kv.block_ids(1) == [1]


def test_growth_that_does_not_fit_changes_nothing():
    kv = KVCacheManager(4, 4)
    kv.add_sequence(1, [], 20)
    kv.grow(1, 4)
    with pytest.raises(OutOfBlocks) as raised:
        kv.grow(1, 16)
    assert (raised.value.needed, raised.value.free) == (3, 2)
    assert (kv.block_ids(1), kv.num_free_blocks) == ([1], 2)
    kv.grow(1, 12)
    with pytest.raises(OutOfBlocks):
        kv.grow_by_one(1)
    kv.check_integrity()


def test_equal_prompts_share_their_full_blocks():
    kv = KVCacheManager(10, 4)
    assert run_prompt(kv, 1, range(10)) == 0
    assert run_prompt(kv, 2, range(10)) == 8
    assert kv.block_ids(2)[:2] == kv.block_ids(1)[:2]
    assert kv.block_ids(2)[2] != kv.block_ids(1)[2]
    assert kv.num_free_blocks == 9 - 4
    kv.free(1)
    assert kv.num_free_blocks == 9 - 3  # the two shared blocks have a holder left
    kv.check_integrity()


def test_the_last_token_is_always_computed():
    """A prompt found entirely computes its last block again; one token more and that block is a hit."""
    kv = KVCacheManager(10, 4)
    run_prompt(kv, 1, range(8))
    assert kv.match_prefix(hashes(range(8)), 8).num_tokens == 4
    assert kv.match_prefix(hashes(range(9)), 9).num_tokens == 8
    assert kv.match_prefix(hashes(range(4)), 4) == PrefixMatch()


def test_a_block_computed_twice_is_held_twice():
    kv = KVCacheManager(10, 4)
    run_prompt(kv, 1, range(8))
    run_prompt(kv, 2, range(8), step=2)  # its last block carries the same hash as 1's
    run_prompt(kv, 3, range(9))
    assert kv.block_ids(3)[:2] == kv.block_ids(1)  # the one published first answers
    kv.free(1)
    kv.free(3)
    kv.check_integrity()


def test_adapter_and_salt_do_not_share():
    kv = KVCacheManager(40, 4)
    for index, (adapter, salt) in enumerate([(None, None), ("a", None), (None, "a"), ("a", "a"), ("b", "a")]):
        extra = extra_key(adapter, salt)
        assert run_prompt(kv, 2 * index, range(9), extra=extra) == 0
        assert run_prompt(kv, 2 * index + 1, range(9), extra=extra) == 8


def test_tails_are_lost_before_shared_heads():
    kv = KVCacheManager(6, 4)
    run_prompt(kv, 1, range(12))
    head, middle, tail = kv.block_ids(1)
    kv.free(1)
    kv.add_sequence(2, [], 12)
    assert kv.grow(2, 12) == [4, 5, tail]  # never used first, then the tail
    assert kv.evictions == 1
    assert kv.match_prefix(hashes(range(13)), 13) == PrefixMatch(8, 2, (head, middle))
    kv.check_integrity()


def test_blocks_with_nothing_to_find_are_lost_first():
    kv = KVCacheManager(7, 4)
    run_prompt(kv, 1, range(6))
    full, partial = kv.block_ids(1)
    run_prompt(kv, 2, range(100, 116))
    kv.free(1)
    kv.free(2)
    kv.add_sequence(3, [], 8)
    assert kv.grow(3, 4) == [partial]
    assert kv.evictions == 0
    assert kv.grow(3, 8) == [full]
    assert kv.evictions == 1


def test_retention_priority_decides_what_is_lost():
    kv = KVCacheManager(7, 4)
    run_prompt(kv, 1, range(4), retention_priority=80)
    run_prompt(kv, 2, range(10, 14))
    run_prompt(kv, 3, range(20, 24), retention_priority=5)
    blocks = {i: kv.block_ids(i)[0] for i in (1, 2, 3)}
    for seq_id in (1, 2, 3):
        kv.free(seq_id)
    kv.add_sequence(4, [], 24)
    assert kv.grow(4, 24)[-3:] == [blocks[3], blocks[2], blocks[1]]


def test_a_hit_gives_the_block_its_own_priority():
    kv = KVCacheManager(4, 4)
    run_prompt(kv, 1, range(4))
    kv.free(1)
    kv.add_sequence(2, hashes(range(5)), 5, retention_priority=90)
    assert kv.pool.priority(1) == 90
    kv.check_integrity()


def test_matching_neither_changes_nor_counts():
    kv = KVCacheManager(10, 4)
    run_prompt(kv, 1, range(9))
    kv.free(1)
    before = (kv.cache.published.total, kv.prefix_queries, kv.prefix_hits, list(kv.pool.free_blocks()))
    assert kv.match_prefix(hashes(range(9)), 9) == PrefixMatch(8, 2, (1, 2))
    assert (kv.cache.published.total, kv.prefix_queries, kv.prefix_hits, list(kv.pool.free_blocks())) == before


def test_queries_and_hits_count_resumption_apart():
    kv = KVCacheManager(20, 4)
    run_prompt(kv, 1, range(9))
    run_prompt(kv, 2, range(9))
    kv.free(2)
    run_prompt(kv, 2, range(9), resumed=True)
    run_prompt(kv, 3, range(9), read_prefix=False)
    assert (kv.prefix_queries, kv.prefix_hits) == (18, 8)
    assert (kv.resumed_prefix_queries, kv.resumed_prefix_hits) == (9, 8)


def test_one_that_must_compute_everything_reads_nothing_but_publishes():
    kv = KVCacheManager(20, 4)
    run_prompt(kv, 1, range(9))
    assert run_prompt(kv, 2, range(9), read_prefix=False) == 0
    assert not set(kv.block_ids(1)) & set(kv.block_ids(2))


def test_without_caching_nothing_is_found():
    kv = KVCacheManager(20, 4, enable_prefix_caching=False)
    run_prompt(kv, 1, range(9))
    assert run_prompt(kv, 2, range(9)) == 0
    assert (len(kv.cache), kv.prefix_queries, kv.match_prefix(hashes(range(9)), 9)) == (0, 0, PrefixMatch())


def test_publishing_goes_only_as_far_as_hashes_and_tokens():
    kv = KVCacheManager(20, 4)
    known = hashes(range(12))
    kv.add_sequence(1, known, 12)
    kv.grow(1, 12)
    kv.publish(1, known, 7, step=1)
    assert len(kv.cache) == 1
    kv.publish(1, known[:2], 12, step=2)
    assert len(kv.cache) == 2
    before = list(kv.cache.hash_of)
    kv.publish(1, known[:2], 12, step=3)  # nothing new
    assert kv.cache.hash_of == before
    kv.publish(1, known, 12, step=4)
    assert [kv.cache.step_of[b] for b in kv.block_ids(1)] == [1, 2, 4]


def test_a_failed_step_is_withdrawn_with_all_who_rest_on_it():
    kv = KVCacheManager(20, 4)
    prompt = hashes(range(12))
    kv.add_sequence(5, prompt, 12)
    kv.grow(5, 8)
    kv.publish(5, prompt, 8, step=3)
    kv.add_sequence(9, prompt, 12)  # finds what step 3 writes
    run_prompt(kv, 2, range(50, 58), step=2)
    kv.grow(5, 12)
    kv.publish(5, prompt, 12, step=4)
    assert kv.withdraw(5) == []
    assert kv.withdraw(3) == [5, 9]
    assert kv.match_prefix(prompt, 13) == PrefixMatch()
    assert kv.match_prefix(hashes(range(50, 60)), 10).num_tokens == 8  # step 2 stands
    kv.check_integrity()
    kv.free(5)
    kv.free(9)
    assert kv.withdraw(3) == []
    kv.check_integrity()


def test_a_hit_rests_on_the_newest_step_that_wrote_it():
    kv = KVCacheManager(20, 4)
    prompt = hashes(range(12))
    kv.add_sequence(1, prompt, 12)
    kv.grow(1, 12)
    for step, num_tokens in ((1, 4), (2, 8), (3, 12)):
        kv.publish(1, prompt, num_tokens, step)
    kv.add_sequence(2, prompt[:2], 9)
    assert kv.withdraw(3) == [1]
    assert kv.withdraw(2) == [1, 2]


def test_what_rests_on_withdrawn_or_forgotten_blocks_is_not_published():
    kv = KVCacheManager(20, 4)
    prompt = hashes(range(12))
    for seq_id, forget in ((1, lambda: kv.withdraw(1)), (2, kv.reset_prefix_cache)):
        kv.add_sequence(seq_id, prompt, 12)
        kv.grow(seq_id, 12)
        kv.publish(seq_id, prompt, 4, step=1)
        forget()
        kv.publish(seq_id, prompt, 12, step=2)
        assert len(kv.cache) == 0
        kv.check_integrity()


def test_reset_forgets_hashes_and_keeps_blocks_in_use():
    kv = KVCacheManager(10, 4)
    run_prompt(kv, 1, range(9))
    run_prompt(kv, 2, range(20, 29))
    kv.free(2)
    table = kv.block_ids(1)
    kv.reset_prefix_cache()
    assert kv.block_ids(1) == table
    assert kv.match_prefix(hashes(range(9)), 9) == PrefixMatch()
    kv.check_integrity()


def test_an_unknown_or_doubled_id_is_caught():
    kv = KVCacheManager(10, 4)
    kv.add_sequence(1, [], 4)
    with pytest.raises(AssertionError, match="held already"):
        kv.add_sequence(1, [], 4)
    with pytest.raises(KeyError):
        kv.grow(2, 4)
    with pytest.raises(ConfigError, match="num_kv_blocks"):
        KVCacheManager(1, 4)


# -- sliding window: 6 tokens, so the query at position 9 sees 4..9 and block 0 is passed


def test_the_window_gives_back_what_nobody_can_see():
    kv = KVCacheManager(10, 4, sliding_window=6, enable_prefix_caching=False)
    kv.add_sequence(1, [], 100)
    assert kv.grow(1, 8) == [1, 2]
    assert kv.grow(1, 9) == [3]  # the query at 8 still sees position 3
    assert kv.num_held(1) == 3
    assert kv.grow(1, 13) == [4]  # queries from 9 on do not
    assert kv.block_ids(1) == [0, 2, 3, 4]
    assert (kv.num_held(1), kv.num_free_blocks) == (3, 6)
    kv.check_integrity()
    kv.free(1)
    assert kv.num_free_blocks == 9


def test_a_decode_inside_a_window_lives_on_few_blocks_for_ever():
    kv = KVCacheManager(1 + 3, 4, sliding_window=6)
    assert kv.peak_blocks(10_000, max_chunk=4) == 3
    kv.add_sequence(1, [], 1)
    kv.grow(1, 4)
    for position in range(4, 400, 4):
        assert kv.blocks_to_grow(1, position + 1, position) <= kv.num_free_blocks
        kv.grow_by_one(1)
        kv.check_integrity()
    assert kv.num_held(1) <= 3
    assert kv.block_ids(1)[:-3] == [0] * 97


def test_a_window_passes_a_shared_block_for_one_holder_only():
    kv = KVCacheManager(10, 4, sliding_window=6)
    run_prompt(kv, 1, range(8))
    kv.add_sequence(2, hashes(range(9)), 9)
    assert kv.block_ids(2) == kv.block_ids(1) == [1, 2]
    kv.grow(1, 9)
    assert kv.passed_blocks(1, 9) == [1]
    assert kv.blocks_to_grow(1, 13, 9) == 1  # block 1 stays with sequence 2
    kv.grow(1, 13, 9)
    assert kv.block_ids(1)[0] == 0
    assert kv.block_ids(2)[0] == 1
    kv.check_integrity()


def test_window_passed_blocks_of_others_do_not_make_room():
    kv = KVCacheManager(4, 4, sliding_window=6)
    run_prompt(kv, 1, range(12))
    kv.add_sequence(2, hashes(range(9)), 9)  # holds blocks 1 and 2 as well
    table = kv.block_ids(1)
    with pytest.raises(OutOfBlocks):
        kv.grow(1, 13)
    assert kv.block_ids(1) == table
    kv.check_integrity()


def test_publishing_late_skips_what_the_window_has_passed():
    kv = KVCacheManager(10, 4, sliding_window=6)
    known = hashes(range(16))
    kv.add_sequence(1, known, 16)
    kv.grow(1, 12)
    kv.grow(1, 16)
    kv.publish(1, known, 16, step=1)
    assert kv.block_ids(1) == [0, 2, 3, 4]
    assert [kv.cache.get(block_hash) for block_hash in known] == [None, 2, 3, 4]
    kv.check_integrity()


def test_a_hit_needs_only_the_blocks_inside_the_window():
    kv = KVCacheManager(10, 4, sliding_window=6)
    tokens = range(16)
    known = hashes(tokens)
    kv.add_sequence(1, known, 16)
    for end in (4, 8, 12, 16):
        kv.grow(1, end)
        kv.publish(1, known, end, step=end)
    assert kv.block_ids(1) == [0, 2, 3, 4]  # block 1 is free, its hash still there
    kv.free(1)
    kv.add_sequence(2, [], 20)
    kv.grow(2, 24)  # the null list first: 5..9, then block 1, lost for ever
    assert kv.cache.get(known[0]) is None
    match = kv.match_prefix(hashes(range(17)), 17)
    assert match == PrefixMatch(16, 2, (3, 4))
    assert kv.add_sequence(3, hashes(range(17)), 17) == 16
    assert kv.block_ids(3) == [0, 0, 3, 4]
    kv.check_integrity()


def test_a_failed_step_reaches_those_whose_window_has_passed_its_blocks():
    kv = KVCacheManager(20, 4, sliding_window=2)
    run_prompt(kv, 1, range(4), step=7)
    kv.add_sequence(2, hashes(range(9)), 9)
    kv.grow(2, 6)
    kv.grow(2, 8, 6)
    assert kv.num_held(2) == 1  # the hit was let go
    assert kv.withdraw(7) == [1, 2]
