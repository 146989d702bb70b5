"""What a plan prepares for CUDA, whose kernels no CPU can run: gathered keys, masks, padding; checked in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_engine.models.attention import AttentionPlan, operator, plan, torch_path, xf

CPU = torch.device("cpu")
ROWS = [(1, 30), (1, 513), (5, 5), (70, 150)]


def decodes_paged(case):
    return AttentionPlan.build(case, block_size=case.block_size, device=CPU, paged_decodes_only=True)


@pytest.mark.parametrize("first_row", [0, 2])
@pytest.mark.parametrize("window", [None, 3, 64])
def test_gathered_rows_give_what_paged_ones_do(make_case, first_row, window):
    case = make_case(ROWS, heads=4, kv_heads=2, window=window)
    keys = decodes_paged(case).gathered(first_row, window)
    token = int(case.query_starts[first_row])
    q = case.q[token:].double()
    k, v = (x[keys.slots].double().repeat_interleave(2, 1) for x in (case.k, case.v))
    mask = keys.bias.materialize((len(q), len(k)), dtype=torch.float64)
    scores = torch.einsum("qhd,khd->hqk", q, k) * case.scale + mask
    got = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    torch.testing.assert_close(got, case.expected()[token:], atol=1e-12, rtol=1e-12)


def test_gathered_keys_leave_out_what_no_query_sees(make_case):
    case = make_case(ROWS, window=10)
    assert len(decodes_paged(case).gathered(0, 10).slots) == 10 + 10 + 5 + 79
    assert len(decodes_paged(case).gathered(2, None).slots) == 5 + 150


def test_gathered_keys_are_made_once_a_step(make_case):
    prepared = decodes_paged(make_case(ROWS))
    assert prepared.gathered(2, None) is prepared.gathered(2, None)
    assert prepared.gathered(2, 8) is not prepared.gathered(2, None)


def test_soft_caps_run_in_torch_with_the_plans_geometry(make_case):
    case = make_case(ROWS, soft_cap=5.0, window=40)
    out = torch.empty_like(case.q)
    geometry = decodes_paged(case).geometry()
    rows = range(len(ROWS))
    torch_path.paged_attention(case.q, case.k, case.v, out, geometry, rows, scale=case.scale, window=40, soft_cap=5.0)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 200])
def test_batches_and_tables_come_in_few_sizes(make_case, rows):
    case = make_case([(1, 20 + row) for row in range(rows)])
    prepared = decodes_paged(case)
    assert prepared.padded_rows == {1: 1, 3: 4, 16: 16, 17: 32, 200: 208}[rows]
    width = prepared.block_tables.shape[1]
    assert width == 16
    padding = prepared.paged_bias.block_tables[rows:]
    assert padding.eq(plan.NULL_BLOCK).all()
    assert prepared.paged_bias.k_seqinfo.seqlen_py[rows:] == [1] * (prepared.padded_rows - rows)


def test_which_operator_on_cuda():
    """Decode rows read their pages where the kernel can; the rest is gathered, for flash or, in float32, CUTLASS."""
    half, single = torch.bfloat16, torch.float32
    assert xf.paged_cuda_op(half, 128, 64).BLOCK_N == 64
    assert xf.paged_cuda_op(half, 128, 16).BLOCK_N == 16
    assert xf.paged_cuda_op(half, 128, 256).BLOCK_N == 64
    assert xf.paged_cuda_op(half, 128, 16) is xf.paged_cuda_op(half, 64, 16), (
        "a class a page size, or Triton recompiles"
    )
    for refused in ((half, 80, 64), (single, 64, 64), (half, 64, 8), (half, 64, 48)):
        assert xf.paged_cuda_op(*refused) is None
    flash, shared = xf.gathered_cuda_op(half, 80)
    assert (flash.NAME.startswith("fa2F"), shared) == (True, True)
    cutlass, shared = xf.gathered_cuda_op(single, 64)
    assert (cutlass.NAME, shared) == ("cutlassF-pt", False)


def test_cuda_splits_a_batch_between_operators(make_case, monkeypatch):
    """The dispatch of a mixed batch, with the CPU's operator standing where CUDA's would."""
    case = make_case(ROWS)
    prepared = decodes_paged(case)
    calls = []

    def paged_op(*_):
        calls.append("paged")
        return xf.cpu_op(None, None)

    def gathered(q, k_cache, v_cache, plan, first_row, window, scale):
        calls.append(("gathered", first_row, window))
        whole = AttentionPlan.build(case, block_size=16, device=CPU)
        full = operator.attention(case.q, k_cache, v_cache, whole, scale=scale, window=window, soft_cap=None)
        return full[len(full) - len(q) :]

    # The padding rows read the null block.
    case.k[:16] = case.v[:16] = 0
    monkeypatch.setattr(xf, "paged_cuda_op", paged_op)
    monkeypatch.setattr(operator, "_gathered", gathered)
    expected = case.expected()
    for window in (None, 4096):
        got = operator._cuda(case.q, case.k, case.v, prepared, scale=case.scale, window=window, soft_cap=None)
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)
    assert calls == ["paged", ("gathered", 2, None), ("gathered", 0, 4096)]
    assert np.array_equal(prepared.kv_lens, case.kv_lens)
