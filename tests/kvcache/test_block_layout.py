"""Block arithmetic against its definition: walk the positions and look."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import ConfigError
from llm_engine.kvcache.block_layout import BlockLayout


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_without_a_window_every_block_is_held(num_tokens, blocks):
    layout = BlockLayout(16)
    assert layout.blocks_for(num_tokens, 0) == layout.blocks_for(num_tokens, num_tokens) == blocks
    assert layout.peak_blocks(num_tokens, 4) == blocks


def test_a_window_passes_a_block_with_its_last_token():
    layout = BlockLayout(4, sliding_window=6)
    # The query at 8 sees 3..8, so it still needs block 0; the query at 9 sees 4..9.
    assert [layout.passed(p) for p in (0, 8, 9, 12, 13)] == [0, 0, 1, 1, 2]
    assert layout.blocks_for(9, 8) == 3
    assert layout.blocks_for(10, 9) == 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(block_size=st.integers(1, 5), window=st.integers(1, 12), total=st.integers(1, 30), chunk=st.integers(1, 12))
def test_windows_against_their_definition(block_size, window, total, chunk):
    layout = BlockLayout(block_size, window)
    held = []
    for start in range(total):
        visible = {
            p // block_size for query in range(start, total) for p in range(max(0, query - window + 1), query + 1)
        }
        assert layout.passed(start) == min(visible)
        for end in range(start + 1, min(total, start + max(chunk, block_size)) + 1):
            blocks = len([b for b in range(-(-end // block_size)) if b >= min(visible)])
            assert layout.blocks_for(end, start) == blocks
            held.append(blocks)
    assert layout.peak_blocks(total, chunk) == max(held)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(block_size=st.integers(1, 5), window=st.integers(1, 12), blocks=st.integers(1, 9))
def test_the_window_span_is_what_the_query_at_a_boundary_sees(block_size, window, blocks):
    boundary = blocks * block_size
    seen = {p // block_size for p in range(max(0, boundary - window + 1), boundary)}
    layout = BlockLayout(block_size, window)
    assert min(layout.window_span, blocks) == max(1, len(seen))


@pytest.mark.parametrize(("block_size", "window", "field"), [(0, None, "block_size"), (16, 0, "sliding_window")])
def test_impossible_sizes_are_refused_by_name(block_size, window, field):
    with pytest.raises(ConfigError, match=field):
        BlockLayout(block_size, window)
