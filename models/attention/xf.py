"""The only module that imports xformers: its version, its quirks, its bias classes, and which operator runs where.

xformers takes over a second to import and logs a page where it finds no GPU kernels, so it is imported at the first
use and told to be quiet before. The bias classes are used through the constructors below, and what operators need of
a bias through ``Geometry``: the next release of xformers moves all of it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import paged

VERSIONS = ((0, 0, 35), (0, 0, 36))
"""Lowest version that works, and the first one above that is not known to."""


@dataclass(frozen=True, slots=True)
class _Modules:
    fmha: Any
    bias: Any
    common: Any


@functools.cache
def _xformers() -> _Modules:
    logging.getLogger("xformers").setLevel(logging.ERROR)
    version = importlib.import_module("xformers").__version__
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not VERSIONS[0] <= found < VERSIONS[1]:
        raise ImportError(f"llm-engine needs xformers >=0.0.35,<0.0.36; {version} is installed")
    fmha = importlib.import_module("xformers.ops.fmha")
    common: Any = importlib.import_module("xformers.ops.fmha.common")
    if torch.cuda.is_available() and not common._built_with_cuda:
        # The wheel's own extension fails to load beside a torch built for another CUDA. Every operator then refuses
        # to run, though the ones we use are Triton kernels or call torch's own and need nothing of it.
        common._built_with_cuda = True
    return _Modules(fmha, fmha.attn_bias, common)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, *, op: Any, scale: float) -> torch.Tensor:
    """xformers' memory-efficient attention: q [1, T, Hkv, G, D], k and v [1, S, Hkv, G, D] -> [1, T, Hkv, G, D]."""
    out: torch.Tensor = _xformers().fmha.memory_efficient_attention_forward(q, k, v, bias, op=op, scale=scale)
    return out


# ---- biases


def paged_causal_bias(
    query_lens: Sequence[int], kv_lens: Sequence[int], block_tables: torch.Tensor, block_size: int, device: torch.device
) -> Any:
    """Rows that read the pool through ``block_tables`` [R, W] int32; the last query of a row sees its last key."""
    return _xformers().bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=query_lens, kv_seqlen=kv_lens, block_tables=block_tables, page_size=block_size, device=device
    )


def gathered_causal_bias(
    query_lens: Sequence[int], kv_lens: Sequence[int], window: int | None, device: torch.device
) -> Any:
    """Rows whose keys lie one after the other; a query sees the last ``window`` keys up to its own, or all of them."""
    bias = _xformers().bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(query_lens, kv_lens, device=device)
    return bias if window is None else bias.make_local_attention_from_bottomright(window)


def geometry(bias: Any) -> paged.Geometry:
    """What a paged bias says, as our own operators read it."""
    return paged.Geometry(
        query_starts=bias.q_seqinfo.seqstart,
        query_starts_list=bias.q_seqinfo.seqstart_py,
        kv_lens=bias.k_seqinfo.seqlen,
        kv_lens_list=bias.k_seqinfo.seqlen_py,
        block_tables=bias.block_tables,
        block_size=bias.page_size,
    )


# ---- operators


@functools.cache
def cpu_op(window: int | None, soft_cap: float | None) -> Any:
    """The CPU operator for layers with this window and soft cap: stock biases carry neither, the class does."""
    return type("CpuPagedFwOp", (_cpu_base(),), {"WINDOW": window, "SOFT_CAP": soft_cap})


@functools.cache
def _cpu_base() -> Any:
    modules = _xformers()

    class CpuPagedFwOp(modules.common.AttentionFwOpBase):  # type: ignore[name-defined, misc]
        """Paged, ragged, causal attention on the CPU, which xformers itself has no operator for."""

        OPERATOR = True
        SUPPORTED_DEVICES = frozenset({"cpu"})
        SUPPORTED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
        SUPPORTED_MAX_K = 1024
        SUPPORTED_ATTN_BIAS_TYPES = (modules.bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,)
        SUPPORTS_DROPOUT = False
        SUPPORTS_CUSTOM_SCALE = True
        SUPPORTS_BMGHK = True
        NAME = "llm_engine_cpu_paged"
        WINDOW: int | None = None
        SOFT_CAP: float | None = None

        @classmethod
        def not_supported_reasons(cls, d: Any) -> list[str]:
            # Not the base class's list: it refuses bfloat16 off a GPU, and takes longer than a small kernel.
            reasons = []
            if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
                reasons.append(f"attn_bias type is {type(d.attn_bias)}")
            if d.query.dtype not in cls.SUPPORTED_DTYPES or d.query.device.type not in cls.SUPPORTED_DEVICES:
                reasons.append(f"dtype={d.query.dtype}, device={d.query.device}")
            if d.query.ndim != 5 or d.key.stride(3) != 0 != d.key.shape[3] - 1:
                reasons.append("keys must be [1, slots, heads, group, head_dim], shared in the group")
            if d.p or d.is_partial or d.output_dtype not in (None, d.query.dtype):
                reasons.append("dropout, partial results and other output types are not supported")
            return reasons

        @classmethod
        def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, None]:
            assert not needs_gradient, "inference only"
            out = paged.paged_attention(
                inp.query,
                inp.key,
                inp.value,
                geometry(inp.attn_bias),
                scale=inp.scale_float,
                window=cls.WINDOW,
                soft_cap=cls.SOFT_CAP,
            )
            return out, None

    return CpuPagedFwOp


@functools.cache
def splitk_op(block_size: int) -> Any:
    """The Triton split-K operator for decode rows over pages of ``block_size``; None where it cannot read them.

    A class is made once per page size: Triton compiles per class constants, and ``get_operator`` of xformers would
    fix the number of splits.
    """
    block_n = min(64, block_size)
    if block_n < 16 or block_n & (block_n - 1) or block_size % block_n:
        return None
    base = importlib.import_module("xformers.ops.fmha.triton_splitk").FwOp
    return type(f"SplitK{block_n}FwOp", (base,), {"BLOCK_N": block_n})


SPLITK_HEAD_DIMS = frozenset({16, 32, 64, 128, 256, 512})


def paged_cuda_op(dtype: torch.dtype, head_dim: int, block_size: int) -> Any:
    """The operator that reads paged decode rows on CUDA, or None: then they are gathered like prefill rows."""
    if dtype not in (torch.float16, torch.bfloat16) or head_dim not in SPLITK_HEAD_DIMS:
        return None
    _xformers()
    return splitk_op(block_size)


def gathered_cuda_op(dtype: torch.dtype, head_dim: int) -> tuple[Any, bool]:
    """The operator for gathered rows on CUDA, and whether grouped heads may share their keys by stride.

    Flash for half precision. CUTLASS for float32 and odd head sizes; it would run each group in a stream of its own.
    """
    fmha = _xformers().fmha
    if dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 8 == 0:
        return fmha.flash.FwOp, True
    return fmha.cutlass.FwOp, False
