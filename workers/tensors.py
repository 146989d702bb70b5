"""Hidden states as frames and back: numpy's and torch's, each imported only where it is used already."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .wire import Buffer, OutputHead, WireError

_NUMPY = frozenset({"float16", "float32", "float64", "int32", "int64", "uint8", "uint64"})
_TORCH = {"bfloat16": 2, "float16": 2, "float32": 4}


def describe_tensor(hidden: Any) -> tuple[str, str, tuple[int, ...]]:
    """(library, type, shape) of a numpy array or a torch tensor."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(hidden, torch.Tensor):
        return "torch", str(hidden.dtype).removeprefix("torch."), tuple(hidden.shape)
    return "numpy", str(hidden.dtype), hidden.shape


def tensor_bytes(hidden: Any) -> Any:
    """Its memory, row by row; from a device it is fetched first. Valid as long as the tensor is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(hidden, torch.Tensor):
        # As plain bytes, since numpy knows no bfloat16.
        hidden = hidden.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return np.ascontiguousarray(hidden).reshape(-1).view(np.uint8).data


def tensor_from(frame: Buffer, head: OutputHead, num_tokens: int, hidden_size: int | None = None) -> Any:
    """The tensor [num_tokens, hidden_size] in a frame: the frame's own memory where that is aligned, else a copy.

    Raises ``WireError``. With no ``hidden_size`` any width will do.
    """
    known = _TORCH if head.library == "torch" else _NUMPY if head.library == "numpy" else ()
    if head.dtype not in known:
        raise WireError(f"a hidden state of {head.library!r} in {head.dtype!r}")
    size = _TORCH[head.dtype] if head.library == "torch" else np.dtype(head.dtype).itemsize
    count = 1
    for length in head.shape:
        count *= length
    if not head.shape or min(head.shape) < 0 or head.shape[0] != num_tokens or count * size != len(frame):
        raise WireError(f"{len(frame)} bytes for a hidden state {list(head.shape)} of {num_tokens} tokens")
    if hidden_size is not None and head.shape != (num_tokens, hidden_size):
        raise WireError(f"a hidden state {list(head.shape)} of {num_tokens} tokens, {hidden_size} wide")
    array = np.frombuffer(frame, np.uint8)
    if array.ctypes.data % 8 or not array.flags.writeable:
        # Small messages lie in the receiver's common buffer, wherever they happened to end up.
        array = array.copy()
    if head.library == "numpy":
        return array.view(head.dtype).reshape(head.shape)
    import torch

    return torch.from_numpy(array).view(getattr(torch, head.dtype)).reshape(head.shape)
