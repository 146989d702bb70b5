"""Weights from safetensors straight into place, one tensor at a time; nothing is unpickled.

A model is built twice by the same code: once with a ``Survey``, which checks every name and shape against the files'
headers and counts, and once with a ``WeightReader``, which reads. So a wrong checkpoint fails before a byte is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import ModelLoadError
from .ops import Linear, TorchOps

Progress = Callable[[int, int], None]

# A file read through a mapping stays resident while it is open; opened anew this often it costs no more than this.
_REOPEN_AFTER = 128 << 20
_SMALL_TABLE = 64 << 20
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and no model needs.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class Checkpoint:
    """The tensors of a folder: in which file each lies, its shape and type. Reads one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        self._read = 0
        for file in self._find_files():
            with self._opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
                    part = tensors.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                    self._files[name] = file

    def _find_files(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelLoadError(f"{index} cannot be read: {error!r}") from error
            for file in files:
                if Path(file).name != file:
                    raise ModelLoadError(f"{index} names {file!r}, which is not a file beside it")
                if not (self.folder / file).exists():
                    raise ModelLoadError(f"{self.folder} lacks {file}, which its index names")
            return files
        if (self.folder / "model.safetensors").exists():
            return ["model.safetensors"]
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(ending))
            hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
            raise ModelLoadError(f"{self.folder} has no .safetensors file{hint}")
        return files

    def _opened(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self.folder / file} is not a readable safetensors file: {error}") from error

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as stored."""
        count = 1
        for size in self.shapes[name]:
            count *= size
        return count * _DTYPE_BYTES[self.dtypes[name]]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ``ModelLoadError`` unless the tensor exists in that shape, in a floating point type."""
        found = self.shapes.get(name)
        if found is None:
            raise ModelLoadError(f"{self.folder} has no weight {name} (expected shape {list(shape)})")
        if found != shape:
            raise ModelLoadError(f"weight {name} has shape {list(found)}; expected {list(shape)}")
        if self.dtypes[name] not in _FLOATS:
            raise ModelLoadError(f"weight {name} is of type {self.dtypes[name]}; expected one of {', '.join(_FLOATS)}")

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy a tensor into ``out`` (same shape), converting type and device."""
        file = self._files[name]
        if self._open is None or self._open[0] != file or self._read > _REOPEN_AFTER:
            self.close()
            self._open, self._read = (file, self._opened(file)), 0
        try:
            out.copy_(self._open[1].get_tensor(name))
        except SafetensorError as error:
            raise ModelLoadError(f"weight {name} cannot be read from {file}: {error}") from error
        self._read += self.nbytes(name)

    def close(self) -> None:
        """Unmap the file at hand. Callable twice."""
        self._open = None


class Survey:
    """Takes part in building a model without reading: checks each weight's name and shape, and counts.

    Its methods return ``None`` in place of what a ``WeightReader`` returns; the model so built is only thrown away.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.names: set[str] = set()
        self.total_bytes = 0
        self.num_parameters = 0

    def linear(self, parts: Sequence[tuple[str, int]], columns: int, *, bias: bool = False) -> Any:
        """One linear layer of the named weights [rows, columns] stacked; ``.weight`` and ``.bias`` are added here."""
        for name, rows in parts:
            self._take(f"{name}.weight", (rows, columns))
            if bias:
                self._take(f"{name}.bias", (rows,))

    def norm(self, name: str, size: int, offset: float) -> Any:
        """A norm's weight [size] in float32, ``offset`` added."""
        self._take(f"{name}.weight", (size,))

    def table(self, name: str, rows: int, columns: int) -> Any:
        """A weight [rows, columns] as it is."""
        self._take(f"{name}.weight", (rows, columns))

    def shared_linear(self, table: Any) -> Any:
        """A linear layer whose weight is a table read before."""

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        self.checkpoint.check(name, shape)
        if name not in self.names:
            self.names.add(name)
            self.total_bytes += self.checkpoint.nbytes(name)
            self.num_parameters += torch.Size(shape).numel()

    def check_nothing_left(self, prefixes: Iterable[str]) -> None:
        """Raise ``ModelLoadError`` where a weight under one of the prefixes was not asked for.

        A layer with a weight more than its architecture has (a bias, a norm) is another architecture.
        """
        under = tuple(prefixes)
        for name in self.checkpoint.shapes:
            if name.startswith(under) and name not in self.names and not name.endswith(_IGNORED_SUFFIXES):
                raise ModelLoadError(f"weight {name} has no place in this architecture")


class WeightReader:
    """Reads what a ``Survey`` has found good; see there for the methods."""

    def __init__(
        self, survey: Survey, ops: TorchOps, dtype: torch.dtype, device: torch.device, progress: Progress | None
    ) -> None:
        self._checkpoint, self._total = survey.checkpoint, survey.total_bytes
        self._ops, self._dtype, self._device = ops, dtype, device
        self._progress = progress
        self._done = 0
        self.weight_bytes = 0

    def linear(self, parts: Sequence[tuple[str, int]], columns: int, *, bias: bool = False) -> Linear:
        rows = sum(count for _, count in parts)
        weight = self._empty(rows, columns)
        offsets = self._empty(rows) if bias else None
        start = 0
        for name, count in parts:
            self._read(f"{name}.weight", weight[start : start + count])
            if offsets is not None:
                self._read(f"{name}.bias", offsets[start : start + count])
            start += count
        return self._ops.linear(weight, offsets)

    def norm(self, name: str, size: int, offset: float) -> torch.Tensor:
        weight = self._empty(size, dtype=torch.float32)
        self._read(f"{name}.weight", weight)
        return weight.add_(offset) if offset else weight

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor:
        weight = self._empty(rows, columns)
        self._read(f"{name}.weight", weight)
        return weight

    def shared_linear(self, table: torch.Tensor) -> Linear:
        # A head laid out for its kernel is nearly twice as fast; where the table is most of the model, memory counts.
        may_copy = table.nbytes <= max(self._total // 8, _SMALL_TABLE)
        return self._ops.linear(table, None, may_copy=may_copy)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype or self._dtype, device=self._device)
        self.weight_bytes += tensor.nbytes
        return tensor

    def _read(self, name: str, out: torch.Tensor) -> None:
        self._checkpoint.read_into(name, out)
        self._done += self._checkpoint.nbytes(name)
        if self._progress is not None:
            self._progress(self._done, self._total)
