"""The operator on the CPU, native and torch, against xformers' own mask in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_engine.models.attention import AttentionPlan, attention, paged, write_kv

ROWS = {
    "one decode": [(1, 1)],
    "decodes": [(1, 5), (1, 64), (1, 129), (1, 200), (1, 16)],
    "long decode": [(1, 1500), (1, 3)],
    "prompts": [(7, 7), (33, 33), (1 + 63, 64)],
    "chunks after a prefix": [(7, 55), (40, 300), (2, 600)],
    "mixed": [(1, 30), (1, 513), (5, 5), (70, 150)],
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(paged, "native_supports", lambda q, k, v: False)
    elif not paged.native_supports(*[torch.empty(1, 1, 1, 1, 64)] * 3):
        pytest.skip("no C++ compiler here")
    return request.param


def check(case):
    got = attention(case.q, case.k, case.v, case.plan(), scale=case.scale, window=case.window, soft_cap=case.soft_cap)
    assert got.dtype == case.dtype
    assert got.shape == case.q.shape
    torch.testing.assert_close(got.double(), case.expected(), atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_ragged_batches(path, make_case, rows, dtype):
    check(make_case(rows, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_head_groups(path, make_case, group, dtype):
    check(make_case(ROWS["mixed"], heads=2 * group, kv_heads=2, dtype=dtype, seed=group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 112, 128, 256])
def test_head_dims(path, make_case, head_dim, dtype):
    check(make_case(ROWS["mixed"], head_dim=head_dim, heads=3, kv_heads=1, dtype=dtype, seed=head_dim))


@pytest.mark.parametrize("block_size", [1, 16, 48, 64])
def test_block_sizes(path, make_case, block_size):
    check(make_case(ROWS["mixed"], block_size=block_size, seed=block_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [1, 7, 64, 100, 4096])
@pytest.mark.parametrize("rows", ["long decode", "mixed"])
def test_windows(path, make_case, rows, window, dtype):
    check(make_case(ROWS[rows], window=window, dtype=dtype, seed=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("soft_cap", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("window", [None, 20])
def test_soft_caps(path, make_case, soft_cap, window, dtype):
    check(make_case(ROWS["mixed"], soft_cap=soft_cap, window=window, dtype=dtype))


def test_half_precision_runs_in_torch(make_case):
    check(make_case(ROWS["mixed"], dtype=torch.float16))


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(path, make_case, seed):
    random = np.random.default_rng(seed)
    decodes = [(1, int(random.integers(1, 700))) for _ in range(random.integers(0, 6))]
    chunks = [(int(q), int(q + random.integers(0, 200))) for q in random.integers(2, 80, random.integers(0, 4))]
    kv_heads = int(random.integers(1, 4))
    check(
        make_case(
            decodes + chunks or [(1, 9)],
            heads=kv_heads * int(random.integers(1, 9)),
            kv_heads=kv_heads,
            head_dim=int(random.choice([32, 64, 80, 128])),
            block_size=int(random.choice([16, 64])),
            dtype=[torch.float32, torch.bfloat16][seed % 2],
            window=None if seed % 3 else int(random.integers(1, 300)),
            soft_cap=None if seed % 4 else 30.0,
            seed=seed,
        )
    )


def test_blocks_before_the_window_may_be_gone(path, make_case):
    """A row whose early blocks were freed has null blocks in their place."""
    case = make_case([(1, 400), (10, 300)], window=50)
    expected = case.expected()
    case.block_tables[0, : (400 - 50) // 16] = 0
    case.block_tables[1, : (300 - 10 - 49) // 16] = 0
    got = attention(case.q, case.k, case.v, case.plan(), scale=case.scale, window=50, soft_cap=None)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)


def test_strided_queries_and_interleaved_caches(path, make_case):
    """Queries cut from a fused projection, keys and values that share a pool."""
    case = make_case(ROWS["mixed"])
    expected = case.expected()
    fused = torch.cat([case.q, torch.zeros_like(case.q)], dim=1)
    pool = torch.stack([case.k, case.v], dim=1)  # [slots, 2, Hkv, D]
    got = attention(
        fused[:, : case.heads], pool[:, 0], pool[:, 1], case.plan(), scale=case.scale, window=None, soft_cap=None
    )
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_long_rows_run_in_torch_where_it_has_tiles(make_case, monkeypatch, window):
    """On a CPU with AMX a bfloat16 batch is shared between the kernel and torch."""
    monkeypatch.setattr(paged, "has_amx", lambda: True)
    check(make_case(ROWS["mixed"], dtype=torch.bfloat16, window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 600])
def test_a_query_gives_the_same_bits_in_any_company(path, make_case, dtype, window):
    """Alone or in a batch, as a decode or in a chunk, on one thread or two: greedy answers must not depend on it."""
    if path == "torch":
        pytest.skip("torch's kernels differ by shape")
    whole = make_case([(1, 1400), (90, 1300)], dtype=dtype, window=window)

    def run(rows):
        part = make_case(whole.rows, dtype=dtype, window=window)
        part.kv_lens = np.array([kv for _, _, kv in rows], dtype=np.int32)
        part.query_starts = np.concatenate(([0], np.cumsum([count for _, count, _ in rows]))).astype(np.int32)
        part.block_tables = whole.block_tables[[row for row, _, _ in rows]]
        part.num_decodes = sum(count == 1 for _, count, _ in rows)
        tokens = [
            whole.query_starts[row] + whole.rows[row][0] - (whole.rows[row][1] - kv) - count + i
            for row, count, kv in rows
            for i in range(count)
        ]
        got = attention(whole.q[tokens], whole.k, whole.v, part.plan(), scale=0.1, window=window, soft_cap=None)
        return dict(zip(tokens, got, strict=True))

    threads = torch.get_num_threads()
    everything = run([(0, 1, 1400), (1, 90, 1300)])
    try:
        torch.set_num_threads(2)
        for part in ([(0, 1, 1400)], [(1, 1, 1300)], [(1, 7, 1290)], [(1, 1, 1250), (0, 1, 1400), (1, 50, 1261)]):
            for token, row in run(part).items():
                assert torch.equal(row, everything[token])
    finally:
        torch.set_num_threads(threads)


def test_the_plan_keeps_no_array_of_the_batch(path, make_case):
    case = make_case(ROWS["mixed"])
    expected, plan = case.expected(), case.plan()
    case.block_tables[:] = 0
    case.kv_lens[:] = 1
    got = attention(case.q, case.k, case.v, plan, scale=case.scale, window=None, soft_cap=None)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)


def test_read_only_arrays_are_taken(make_case):
    """Arrays decoded from a message are views of its bytes."""
    case = make_case(ROWS["mixed"])
    for array in (case.block_tables, case.kv_lens, case.query_starts):
        array.setflags(write=False)
    check(case)


def test_write_kv_puts_each_token_in_its_slot():
    k_cache, v_cache = torch.zeros(32, 2, 8), torch.zeros(32, 2, 8)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    write_kv(k, v, k_cache, v_cache, torch.tensor([5, 30, 6]))
    assert torch.equal(k_cache[[5, 30, 6]], k)
    assert torch.equal(v_cache[[5, 30, 6]], v)
    assert k_cache.abs().sum() == pytest.approx(k.abs().sum())
    assert not v_cache[0].any()


def test_a_row_with_more_queries_than_keys_is_refused(make_case):
    case = make_case([(4, 9)])
    case.kv_lens[0] = 3
    with pytest.raises(AssertionError, match="more queries"):
        AttentionPlan.build(case, block_size=16, device=torch.device("cpu"))
