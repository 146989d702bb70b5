"""The native operations against the torch ones that define them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_engine.models import native_ops
from llm_engine.models.attention import AttentionPlan
from llm_engine.models.native_ops import NativeLinear, NativeOps, select_ops
from llm_engine.models.ops import Step, TorchOps
from llm_engine.models.rope import RopeTable
from llm_engine.native import build

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def native():
    if not NativeOps.supports(CPU, torch.float32):
        pytest.skip("no C++ compiler here")
    return NativeOps()


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, expected):
    assert got.dtype == expected.dtype
    # One rounding of bfloat16 may fall the other way; torch rounds some values twice.
    tolerance = 1e-6 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("size", [24, 576])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_norms(native, dtype, size, tokens):
    hidden, delta = random(tokens, size, dtype=dtype), random(tokens, size, dtype=dtype, seed=1)
    weight, before = random(size, seed=2), hidden.clone()
    close(native.rms_norm(hidden, weight, 1e-5), TorchOps().rms_norm(hidden, weight, 1e-5))
    for given in (delta, None):
        got = native.add_rms_norm(hidden, given, weight, 1e-5)
        expected = TorchOps().add_rms_norm(hidden, given, weight, 1e-5)
        close(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert torch.equal(hidden, before)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize(
    ("head_dim", "rotated", "normed"), [(64, 64, False), (80, 32, False), (128, 128, True), (40, 0, True)]
)
def test_rotate_and_store(native, dtype, tokens, head_dim, rotated, normed):
    heads, kv_heads, slots = 6, 2, 512
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = torch.arange(400)[:, None] * torch.linspace(0.01, 1, max(rotated // 2, 1))
    rope = RopeTable(angles.cos(), angles.sin()) if rotated else None
    norm = random(heads + kv_heads, head_dim, seed=3) if normed else None
    positions = torch.randint(0, 400, (tokens,), generator=torch.Generator().manual_seed(4))
    mapping = torch.randperm(slots, generator=torch.Generator().manual_seed(5))[:tokens]

    def run(ops):
        pool = torch.zeros(slots, 2, kv_heads, head_dim, dtype=dtype)
        q = ops.rotate_and_store(
            qkv,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=norm,
            eps=1e-6,
            rope=rope,
            k_cache=pool[:, 0],
            v_cache=pool[:, 1],
            step=Step(positions, mapping, plan(tokens)),
        )
        return q, pool

    for got, expected in zip(run(native), run(TorchOps()), strict=True):
        close(got, expected)


def plan(tokens):
    class Batch:
        num_decodes = 0
        query_starts = np.array([0, tokens], dtype=np.int32)
        kv_lens = np.array([tokens], dtype=np.int32)
        block_tables = np.ones((1, 1), dtype=np.int32)

    return AttentionPlan.build(Batch(), block_size=512, device=CPU)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("size", [8, 100, 1536])
@pytest.mark.parametrize("tokens", [1, 90])
def test_gated(native, dtype, activation, size, tokens):
    gate_up = random(tokens, 2 * size, dtype=dtype) * 4
    gate_up[0, :4] = torch.tensor([90.0, -90.0, 0.0, 1e-3])
    got = native.gated(gate_up, activation)
    assert got.dtype == dtype
    # Against float64: torch's own float32 gelus, of which one is used here, lose their digits far below zero.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5 if activation == "gelu" else 1e-6
    torch.testing.assert_close(
        got.double(), TorchOps().gated(gate_up.double(), activation), rtol=tolerance, atol=tolerance
    )


@DTYPES
@pytest.mark.parametrize(("outputs", "inputs"), [(768, 64), (100, 300), (33, 1030), (5, 3500)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(native, dtype, outputs, inputs, with_bias):
    weight = random(outputs, inputs, dtype=dtype)
    bias = random(outputs, dtype=dtype, seed=1) if with_bias else None
    if not NativeLinear.supports(weight):
        pytest.skip("no linear kernel for this CPU")
    linear = native.linear(weight, bias)
    assert type(linear) is NativeLinear
    whole = random(100, inputs, dtype=dtype, seed=2) / inputs**0.5
    got = linear(whole)
    assert got.dtype == dtype
    expected = torch.nn.functional.linear(whole.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 3e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    for count in (1, 2, 11, 12, 13, 25):
        assert torch.equal(linear(whole[:count]), got[:count]), "the bits of a row depend on the others"
    assert torch.equal(linear(torch.cat([whole, whole], 1)[:, inputs:]), got), "rows apart"


def test_linears_that_are_left_to_torch(native, monkeypatch):
    weight = random(256, 256)
    for given in (random(8, 8), random(256, 512)[:, ::2], weight.half(), weight[:, :255].bfloat16()):
        assert not NativeLinear.supports(given)
    assert type(native.linear(weight, None, may_copy=False)) is not NativeLinear
    monkeypatch.setattr(native_ops, "has_amx", lambda: True)
    assert not NativeLinear.supports(weight.bfloat16())


def test_a_row_gives_the_same_bits_in_any_company(native):
    hidden, weight = random(300, 576), random(576, seed=1)
    assert torch.equal(native.rms_norm(hidden, weight, 1e-5)[7:8], native.rms_norm(hidden[7:8], weight, 1e-5))


def test_what_is_not_a_number_stays_so(native):
    hidden = torch.full((1, 32), float("nan"), dtype=torch.bfloat16)
    assert native.rms_norm(hidden, torch.ones(32), 1e-5).isnan().all()
    assert native.gated(hidden, "silu").isnan().all()


def test_selection(native, monkeypatch):
    assert type(select_ops(CPU, torch.bfloat16)) is NativeOps
    assert type(select_ops(CPU, torch.float16)) is TorchOps
    monkeypatch.setattr(build, "_loaded", [None])
    from llm_engine.native import kernels

    kernels.function.cache_clear()
    assert type(select_ops(CPU, torch.float32)) is TorchOps
    kernels.function.cache_clear()
