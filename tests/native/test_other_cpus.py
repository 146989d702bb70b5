"""The kernels built for lesser CPUs than this one give the same answers."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from llm_engine.models.attention import paged
from llm_engine.models.native_ops import NativeLinear, NativeOps
from llm_engine.models.ops import TorchOps
from llm_engine.native import build, kernels

LEVELS = {"AVX-512": ("x86-64-v4", "avx512bw"), "AVX2": ("haswell", "fma"), "plain": ("x86-64", "sse2")}


@pytest.fixture(scope="module", params=LEVELS)
def library(request, tmp_path_factory):
    march, needed = LEVELS[request.param]
    compiler = build.find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    if needed not in build._cpu():
        pytest.skip(f"this CPU lacks {request.param}")
    # Barely optimised: it is the code for each CPU that is tested, and compiling is most of the time here.
    swap = {"-march=native": f"-march={march}", "-O3": "-O1"}
    flags = tuple(swap.get(flag, flag) for flag in build.FLAGS)
    return ctypes.CDLL(str(build.compiled(compiler, tmp_path_factory.mktemp("kernels"), flags)))


@pytest.fixture(autouse=True)
def use(library, monkeypatch):
    monkeypatch.setattr(build, "_loaded", [library])
    kernels.function.cache_clear()
    yield
    kernels.function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_attention(dtype, head_dim, soft_cap):
    generator = torch.Generator().manual_seed(head_dim)
    tokens, slots, heads, kv_heads = 9, 160, 6, 2
    q = torch.randn(1, tokens, kv_heads, heads // kv_heads, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, slots, kv_heads, 1, head_dim, generator=generator).to(dtype)
    shape = (1, -1, -1, heads // kv_heads, -1)
    # Rows: a decode after 99 tokens, and 8 queries of 40; blocks of 16, in no order.
    tables = torch.tensor([[3, 9, 1, 5, 7, 2, 8], [4, 6, 9, 0, 0, 0, 0]], dtype=torch.int32)
    geometry = paged.Geometry(
        query_starts=torch.tensor([0, 1, 9], dtype=torch.int32),
        query_starts_list=[0, 1, 9],
        kv_lens=torch.tensor([100, 40], dtype=torch.int32),
        kv_lens_list=[100, 40],
        block_tables=tables,
        block_size=16,
    )
    arguments = (q, k.expand(shape), v.expand(shape), geometry)
    assert paged.native_supports(*arguments[:3])
    got = paged.paged_attention(*arguments, scale=0.2, window=70, soft_cap=soft_cap)
    wide = [x.double() for x in arguments[:3]]
    expected = paged.paged_attention(*wide, geometry, scale=0.2, window=70, soft_cap=soft_cap)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_elementwise(dtype):
    x = torch.randn(3, 2 * 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for activation in ("silu", "gelu_tanh"):
        expected = TorchOps().gated(x.double(), activation)
        got = NativeOps().gated(x, activation).double()
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    weight = torch.linspace(0.5, 2, 200)
    expected = TorchOps().rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(NativeOps().rms_norm(x, weight, 1e-6), expected, atol=tolerance, rtol=tolerance)


def test_linear():
    weight = torch.randn(160, 200, generator=torch.Generator().manual_seed(2))
    assert not NativeLinear.supports(weight.bfloat16()), "built without AVX512_BF16"
    if not NativeLinear.supports(weight):
        return  # left to torch
    x = torch.randn(17, 200, generator=torch.Generator().manual_seed(3)) / 14
    expected = torch.nn.functional.linear(x.double(), weight.double())
    torch.testing.assert_close(NativeLinear(weight, None)(x).double(), expected, atol=2e-6, rtol=2e-6)
