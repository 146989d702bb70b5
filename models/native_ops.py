"""The decoder's operations by native kernels, one pass each; what they do not take goes to torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..native import kernels
from ..native.memory import prefer_large_pages
from .attention.paged import has_amx
from .ops import Linear, Step, TorchOps
from .rope import RopeTable

_DTYPES = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


# Below this many elements torch's plain linear is as fast, and packing is memory copied for nothing.
_PACK_FROM = 1 << 14


class NativeLinear:
    """A linear layer whose weight lies in the order in which the kernel reads it; the original is not kept.

    A row's result has the same bits whatever other rows there are.
    """

    __slots__ = ("bias", "dtype", "inputs", "kernel", "outputs", "packed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.outputs, self.inputs = weight.shape
        self.dtype, self.bias = _DTYPES[weight.dtype], bias
        self.kernel = _kernel("linear")
        size = kernels.packed_linear_size(self.dtype, self.outputs, self.inputs)
        self.packed = torch.empty(size, dtype=weight.dtype)
        prefer_large_pages(self.packed.data_ptr(), self.packed.nbytes)
        assert weight.stride(1) == 1
        assert bias is None or (bias.dtype == weight.dtype and bias.is_contiguous())
        threads = torch.get_num_threads()
        pack = _kernel("pack_linear")
        pack(self.dtype, weight.data_ptr(), self.packed.data_ptr(), *weight.shape, weight.stride(0), threads)

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Whether there is a kernel here that pays: with AMX, oneDNN's bfloat16 is ahead from a few rows on."""
        if weight.numel() < _PACK_FROM or weight.dtype not in _DTYPES or weight.stride(1) != 1:
            return False
        if weight.dtype == torch.bfloat16 and has_amx():
            return False
        return kernels.packed_linear_size(_DTYPES[weight.dtype], *weight.shape) > 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty(rows, self.outputs, dtype=x.dtype)
        self.kernel(
            self.dtype,
            x.data_ptr(),
            self.packed.data_ptr(),
            _address(self.bias),
            out.data_ptr(),
            rows,
            self.outputs,
            self.inputs,
            x.stride(0),
            torch.get_num_threads(),
        )
        return out


class NativeOps(TorchOps):
    """``TorchOps`` on the CPU in float32 or bfloat16, native but for what has no kernel."""

    def __init__(self) -> None:
        self._add_rms_norm = _kernel("add_rms_norm")
        self._rotate_and_store = _kernel("rotate_and_store")
        self._gated = _kernel("gated")

    @staticmethod
    def supports(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there are kernels here for this device and type."""
        return device.type == "cpu" and dtype in _DTYPES and kernels.function("gated") is not None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, *, may_copy: bool = True) -> Linear:
        """Make of a weight [N, K] what computes; the weight itself is not changed.

        ``may_copy=False``: the weight is kept for something else too, and no second one may be held in memory.
        """
        if may_copy and NativeLinear.supports(weight):
            return NativeLinear(weight, bias)
        return super().linear(weight, bias, may_copy=may_copy)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[T, H], float32 weight [H] -> [T, H], computed in float32."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._norm(x, None, weight, out, None, eps)
        return out

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's output to the residual stream and norm the sum: (normed, sum). Changes neither argument."""
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        if delta is None:
            self._norm(hidden, None, weight, out, None, eps)
            return out, hidden
        total = torch.empty_like(hidden)
        self._norm(hidden, delta.contiguous(), weight, out, total, eps)
        return out, total

    def _norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
        total: torch.Tensor | None,
        eps: float,
    ) -> None:
        rows, size = hidden.shape
        assert weight.dtype == torch.float32
        self._add_rms_norm(
            _DTYPES[hidden.dtype],
            hidden.data_ptr(),
            _address(delta),
            weight.data_ptr(),
            out.data_ptr(),
            _address(total),
            rows,
            size,
            eps,
            torch.get_num_threads(),
        )

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: torch.Tensor | None,
        eps: float,
        rope: RopeTable | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, write keys and values to the cache: [T, (Hq + 2 Hkv) * D] -> q [T, Hq, D].

        ``qk_norm`` is float32 [Hq + Hkv, D], the query's weight for each query head, then the key's; caches are
        [num_slots, Hkv, D] with heads side by side.
        """
        qkv = qkv.contiguous()
        tokens = qkv.shape[0]
        q = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype)
        assert k_cache[0].is_contiguous()
        assert v_cache[0].is_contiguous()
        self._rotate_and_store(
            _DTYPES[qkv.dtype],
            qkv.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            step.positions.data_ptr(),
            step.slot_mapping.data_ptr(),
            None if rope is None else rope.cos.data_ptr(),
            None if rope is None else rope.sin.data_ptr(),
            _address(qk_norm),
            tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            0 if rope is None else rope.dim,
            k_cache.stride(0),
            v_cache.stride(0),
            eps,
            torch.get_num_threads(),
        )
        return q

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * up: [T, 2 * I] -> [T, I]"""
        code = _ACTIVATIONS.get(activation)
        if code is None:
            return super().gated(gate_up, activation)
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype)
        self._gated(
            _DTYPES[gate_up.dtype],
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            size,
            code,
            torch.get_num_threads(),
        )
        return out


def select_ops(device: torch.device, dtype: torch.dtype) -> TorchOps:
    """The fastest operations there are for this device and type."""
    return NativeOps() if NativeOps.supports(device, dtype) else TorchOps()


def _kernel(name: str) -> Callable[..., None]:
    function = kernels.function(name)
    assert function is not None, "NativeOps.supports says whether there are kernels"
    return function


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
