"""The decoder, or the part of it that one pipeline stage holds. This is the definition; ``ops`` only computes it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..native.memory import prefer_large_pages
from .layers import DecoderLayer
from .ops import Step, TorchOps
from .rope import RopeTable
from .spec import ModelSpec
from .weights import Survey, WeightReader

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class StageRange:
    """Which layers a stage holds. The first stage also embeds; the last has the final norm and the head."""

    start: int
    end: int
    num_layers: int
    """Of the whole model."""

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.num_layers


class Decoder:
    """Layers ``stage.start`` to ``stage.end`` of a model, with the embedding and head where they belong."""

    def __init__(
        self,
        spec: ModelSpec,
        stage: StageRange,
        ops: TorchOps,
        ropes: Mapping[str, RopeTable],
        load: Survey | WeightReader,
    ) -> None:
        self.spec, self.stage, self.ops = spec, stage, ops
        names, size = spec.names, (spec.vocab_size, spec.hidden_size)
        self.embedding = load.table(names.embedding, *size) if stage.is_first else None
        self.layers = [DecoderLayer(spec, index, ops, ropes, load) for index in range(stage.start, stage.end)]
        if not stage.is_last:
            return
        self.final_norm = load.norm(names.final_norm, spec.hidden_size, spec.norm_offset)
        if not spec.tie_embeddings:
            self.head = load.linear([(names.head, spec.vocab_size)], spec.hidden_size)
        elif stage.is_first:
            self.head = load.shared_linear(self.embedding)
        else:
            self.head = load.linear([(names.embedding, spec.vocab_size)], spec.hidden_size)

    @property
    def weight_prefixes(self) -> list[str]:
        """Beginnings of the names of this stage's layers' weights."""
        return [f"{self.spec.names.layers}{index}." for index in range(self.stage.start, self.stage.end)]

    def allocate(self, num_slots: int, dtype: torch.dtype, device: torch.device, *, prefault: bool = False) -> None:
        """Give each layer its keys and values: [num_slots, Hkv, D] each, zeros.

        On the CPU the system hands their memory over as it is written, and an idle pool costs nothing; with
        ``prefault`` now, so that no step waits for it.
        """
        shape = (num_slots, self.spec.num_kv_heads, self.spec.head_dim)
        for layer in self.layers:
            layer.attention.k_cache = _zeros(shape, dtype, device, prefault)
            layer.attention.v_cache = _zeros(shape, dtype, device, prefault)

    def forward(self, inputs: torch.Tensor, logit_rows: torch.Tensor, step: Step) -> torch.Tensor:
        """Token ids [T] on the first stage, else hidden states [T, H]. Returns hidden states [T, H], or on the last
        stage the logits [L, V] in float32 of ``logit_rows`` [L]."""
        spec, ops = self.spec, self.ops
        hidden = ops.embed(inputs, self.embedding, spec.embedding_scale) if self.stage.is_first else inputs  # [T, H]
        delta: torch.Tensor | None = None
        for layer in self.layers:
            hidden, delta = layer(hidden, delta, step)
        assert delta is not None, "a stage without layers"
        if not self.stage.is_last:
            return hidden + delta
        hidden, delta = hidden[logit_rows], delta[logit_rows]  # [L, H]
        x, _ = ops.add_rms_norm(hidden, delta, self.final_norm, spec.norm_eps)
        return ops.logits(x, self.head, spec.final_soft_cap)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, prefault: bool) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel() * dtype.itemsize
    memory = np.zeros(count + _ALIGNMENT, np.uint8)
    prefer_large_pages(memory.ctypes.data, memory.nbytes)
    if prefault:
        memory[:: mmap.PAGESIZE] = 0
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + count]).view(dtype).view(shape)
