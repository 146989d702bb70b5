"""Hidden states as frames: whose library, which type, which memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from llm_engine.workers.tensors import describe_tensor, tensor_bytes, tensor_from
from llm_engine.workers.wire import OutputHead, WireError


def head(library: str, dtype: str, shape: tuple[int, ...]) -> OutputHead:
    return OutputHead([], None, library, dtype, shape)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint64"])
def test_numpy_arrays_arrive_as_they_were(dtype: str) -> None:
    hidden = np.arange(12).reshape(3, 4).astype(dtype)
    described = describe_tensor(hidden)
    assert described == ("numpy", dtype, (3, 4))
    received = tensor_from(bytearray(tensor_bytes(hidden)), head(*described), 3)  # type: ignore[arg-type]
    assert received.dtype == hidden.dtype
    assert np.array_equal(received, hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_tensors_arrive_as_they_were(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    hidden = torch.randn(3, 8).to(getattr(torch, dtype))[:, ::2]  # strided: sent row by row
    described = describe_tensor(hidden)
    assert described == ("torch", dtype, (3, 4))
    received = tensor_from(bytearray(tensor_bytes(hidden)), head(*described), 3)  # type: ignore[arg-type]
    assert received.dtype == hidden.dtype
    assert torch.equal(received, hidden)


def test_aligned_memory_is_used_and_other_memory_copied() -> None:
    hidden = np.arange(4, dtype=np.float32).reshape(2, 2)
    memory = bytearray(64)
    at = -np.frombuffer(memory, np.uint8).ctypes.data % 8
    for offset, shared in ((at, True), (at + 1, False)):
        frame = memoryview(memory)[offset : offset + 16]
        frame[:] = tensor_bytes(hidden)
        received = tensor_from(frame, head("numpy", "float32", (2, 2)), 2)
        assert received.flags.aligned
        frame[:] = bytes(16)
        assert np.array_equal(received, np.zeros((2, 2)) if shared else hidden)


def test_read_only_memory_is_copied() -> None:
    received = tensor_from(bytes(16), head("numpy", "float32", (2, 2)), 2)
    assert received.flags.writeable


def test_another_width_than_the_models_is_refused() -> None:
    frame = bytearray(24)
    assert tensor_from(frame, head("numpy", "float32", (2, 3)), 2, 3).shape == (2, 3)  # type: ignore[arg-type]
    for shape in ((2, 3, 1), (2, 1, 3), (6,), (2, 2)):
        with pytest.raises(WireError, match="of 2 tokens"):
            tensor_from(frame, head("numpy", "float32", shape), 2, 3)  # type: ignore[arg-type]
    with pytest.raises(WireError, match=r"a hidden state \[2, 3\] of 2 tokens, 4 wide"):
        tensor_from(frame, head("numpy", "float32", (2, 3)), 2, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (head("numpy", "object", (2, 2)), "'numpy' in 'object'"),
        (head("torch", "Tensor", (2, 2)), "'torch' in 'Tensor'"),
        (head("os", "float32", (2, 2)), "'os' in 'float32'"),
        (head("numpy", "float32", (3, 2)), r"16 bytes for a hidden state \[3, 2\] of 2 tokens"),
        (head("numpy", "float32", (2, 3)), "16 bytes"),
        (head("numpy", "float32", (-2, -2)), "16 bytes"),
        (head("numpy", "float32", (2, 1 << 62, 1 << 62)), "16 bytes"),
        (head("numpy", "float32", ()), "16 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(bad: OutputHead, says: str) -> None:
    with pytest.raises(WireError, match=says):
        tensor_from(bytearray(16), bad, 2)  # type: ignore[arg-type]


def test_neither_the_wire_nor_a_stage_process_loads_torch() -> None:
    code = "import sys, llm_engine.workers.stage_process, llm_engine.workers.tensors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
