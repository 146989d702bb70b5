"""Sampling in torch, on the device the logits are on. The same definitions as ``numpy_logits``, by sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .batch import Int64
from .logits import Draws, Float32, Scores

_MAX_ELEMENTS = 1 << 25
"""Of a temporary array; larger jobs are done in slices of rows."""


class TorchLogits:
    """``Logits`` over a torch tensor. Sums over the vocabulary may differ from numpy's in the last bits."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    @property
    def vocab_size(self) -> int:
        return self._values.shape[1]

    def take(self, rows: Int64) -> TorchLogits:
        return TorchLogits(self._values[self._send(rows)])

    @torch.inference_mode()
    def argmax(self) -> Int64:
        # torch.argmax promises no particular one of equal logits
        values = self._values
        ids = torch.arange(values.shape[1], device=values.device)
        is_largest = values == values.amax(dim=1, keepdim=True)
        tokens: Int64 = _fetch(torch.where(is_largest, ids, values.shape[1] - 1).amin(dim=1))
        return tokens

    def get(self, rows: Int64, ids: Int64) -> Float32:
        values: Float32 = self._values[self._send(rows), self._send(ids)].cpu().numpy()
        return values

    @torch.inference_mode()
    def put(self, rows: Int64, ids: Int64, values: Float32 | float) -> None:
        new = self._send(np.asarray(values, np.float32))
        self._values[self._send(rows), self._send(ids)] = new

    @torch.inference_mode()
    def keep_only(self, row: int, ids: Int64) -> None:
        places = self._send(ids)
        kept = self._values[row, places]
        self._values[row] = -torch.inf
        self._values[row, places] = kept

    @torch.inference_mode()
    def draw(self, rows: Int64, draws: Draws) -> Int64:
        step = max(_MAX_ELEMENTS // self.vocab_size, 1)
        parts = []
        for begin in range(0, len(rows), step):
            part = np.arange(begin, min(begin + step, len(rows)))
            parts.append(self._draw(self._values[self._send(rows[part])], draws.take(part)))
        return np.concatenate([_fetch(part) for part in parts])

    @torch.inference_mode()
    def score(self, tokens: Int64, num_top: int) -> Scores:
        x = self._values
        own = x.gather(1, self._send(tokens)[:, None])
        norm = torch.logsumexp(x.double(), dim=1, keepdim=True)
        ranks = 1 + (x > own).sum(dim=1)
        top, top_ids = torch.sort(x, dim=1, descending=True, stable=True)
        return Scores(
            _fetch((own - norm)[:, 0]), _fetch(ranks), _fetch(top_ids[:, :num_top]), _fetch(top[:, :num_top] - norm)
        )

    def _draw(self, x: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Draw every row of x [R, V]."""
        vocab_size = x.shape[1]
        temperature = self._send(draws.temperature)[:, None]
        largest = x.amax(dim=1, keepdim=True)
        weights = torch.exp((x - largest) / temperature)
        if draws.min_p.any():
            weights = torch.where(weights >= self._send(draws.min_p)[:, None], weights, 0.0)
        has_top_k = (draws.top_k > 0) & (draws.top_k < vocab_size)
        if has_top_k.any() or (draws.top_p < 1.0).any():
            limit = self._send(np.where(has_top_k, draws.top_k, vocab_size))[:, None]
            weights = torch.where(self._cut(x, weights, limit, self._send(draws.top_p)[:, None]), weights, 0.0)
        running = weights.cumsum(dim=1, dtype=torch.float64)
        target = self._send(draws.uniform)[:, None] * running[:, -1:]
        chosen = torch.searchsorted(running, target, right=True)[:, 0].clamp(max=vocab_size - 1)
        fallback = x.argmax(dim=1)
        return torch.where(running[:, -1] > 0, chosen, fallback)

    @staticmethod
    def _cut(x: torch.Tensor, weights: torch.Tensor, limit: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        """[R, V] which tokens top_k and top_p keep, the likeliest first and the lower id first among equals."""
        order = torch.sort(x, dim=1, descending=True, stable=True).indices
        ordered = weights.gather(1, order).double()
        places = torch.arange(x.shape[1], device=x.device)
        ordered = torch.where(places < limit, ordered, 0.0)
        running = ordered.cumsum(dim=1)
        before = torch.nn.functional.pad(running[:, :-1], (1, 0))
        kept = (places < limit) & ((before < top_p * running[:, -1:]) | (top_p >= 1.0))
        return torch.zeros_like(kept).scatter(1, order, kept)

    def _send(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array)).to(self._values.device)


def _fetch(tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy()
