"""Block hashes: chained, full blocks only, the same everywhere, set apart by adapter and salt."""

from hashlib import blake2b
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.kvcache.block_hash import HASH_BYTES, extra_key, hash_blocks

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def test_only_full_blocks_are_hashed():
    assert [len(hash_blocks(range(n), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(h) == HASH_BYTES for h in hash_blocks(range(8), 4))


def test_a_hash_stands_for_everything_before_it():
    first, other = hash_blocks([1, 2, 9, 9], 2), hash_blocks([1, 3, 9, 9], 2)
    assert first[0] != other[0]
    assert first[1] != other[1]  # equal tokens, different past


def test_the_encoding_is_fixed():
    """Little-endian 32-bit tokens, so that processes and machines agree."""
    root = blake2b(b"\x00", digest_size=32).digest()
    expected = blake2b(root + b"\x01\x00\x00\x00\x00\x01\x00\x00", digest_size=32).digest()
    assert hash_blocks([1, 256], 2) == [expected]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens=TOKENS, cut=st.integers(0, 40), block_size=st.integers(1, 5))
def test_extending_in_place_is_hashing_at_once(tokens, cut, block_size):
    known = hash_blocks(tokens[:cut], block_size, extra=b"x")
    before = list(known)
    extended = hash_blocks(tokens, block_size, known=known, extra=b"x")
    assert extended is known
    assert extended[: len(before)] == before
    assert extended == hash_blocks(tokens, block_size, extra=b"x")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(one=TOKENS, other=TOKENS, block_size=st.integers(1, 5))
def test_hashes_agree_exactly_as_far_as_tokens_do(one, other, block_size):
    hashes = zip(hash_blocks(one, block_size), hash_blocks(other, block_size), strict=False)
    for index, (left, right) in enumerate(hashes):
        stop = (index + 1) * block_size
        assert (left == right) == (one[:stop] == other[:stop])


def test_adapter_and_salt_set_every_block_apart():
    texts = [None, "", "a", "b", "a\x00b", "\x01"]
    keys = {(adapter, salt): extra_key(adapter, salt) for adapter, salt in product(texts, texts)}
    assert keys[None, None] is None
    assert len(set(keys.values())) == len(keys)  # no pair is mistaken for another
    hashes = [hash_blocks(range(6), 2, extra=key) for key in keys.values()]
    for index in range(3):
        assert len({chain[index] for chain in hashes}) == len(keys)


def test_a_lone_surrogate_in_a_salt_is_only_text():
    assert extra_key(None, "\ud800") is not None


def test_a_token_that_is_no_32_bit_number_is_refused():
    with pytest.raises(OverflowError):
        hash_blocks([2**31], 1)
