"""What the sampler does to a step's logits, whatever array they are.

``NumpyLogits`` serves everything on the CPU, torch tensors there included (they share their memory); ``TorchLogits``
serves other devices, so that [S, V] numbers never travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .batch import Int64

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(slots=True)
class Draws:
    """How each of R rows is drawn, in columns.

    A row's weights are ``exp((logit - largest) / temperature)``. Kept are those of at least ``min_p`` (the likeliest
    one weighs 1), of these the ``top_k`` likeliest, of these the likeliest that together reach ``top_p`` of their sum;
    among equal logits the lower ids come first. The token is the first id at which the running sum of the kept
    weights, taken in order of ids in float64, exceeds ``uniform`` times their total (inverse transform sampling). So a
    row's token follows from the row alone. A row with nothing finite to draw from yields its argmax.
    """

    temperature: Float32
    """[R] above 0"""
    top_k: Int64
    """[R] 0 for no limit"""
    top_p: Float64
    """[R] 1 for no limit"""
    min_p: Float32
    """[R] 0 for no limit"""
    uniform: Float64
    """[R] in [0, 1)"""

    def take(self, rows: Int64) -> Draws:
        return Draws(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows])


@dataclass(slots=True)
class Scores:
    """Log-probabilities of R rows."""

    logprobs: Float64
    """[R] of the rows' tokens"""
    ranks: Int64
    """[R] of the rows' tokens, 1 for the likeliest"""
    top_ids: Int64
    """[R, N] the likeliest first, the lower id first among equals"""
    top_logprobs: Float64
    """[R, N]"""


class Logits(Protocol):
    """[S, V] float32. Rows and columns are given and returned in numpy."""

    @property
    def vocab_size(self) -> int: ...

    def take(self, rows: Int64) -> Logits:
        """A copy of some rows."""

    def argmax(self) -> Int64:
        """[S] the likeliest ids, the lowest among equals."""

    def get(self, rows: Int64, ids: Int64) -> Float32:
        """[N] the logits at N places."""

    def put(self, rows: Int64, ids: Int64, values: Float32 | float) -> None:
        """Set the logits at N places; a place given twice must be given the same value."""

    def keep_only(self, row: int, ids: Int64) -> None:
        """Ban every other id of a row."""

    def draw(self, rows: Int64, draws: Draws) -> Int64:
        """[R] ids, drawn as ``Draws`` says."""

    def score(self, tokens: Int64, num_top: int) -> Scores:
        """What one token of each row scores, [S], with the ``num_top`` likeliest beside it."""


def wrap(logits: Any) -> Logits:
    """View a numpy array or a torch tensor as ``Logits``; changes go through to it."""
    from .numpy_logits import NumpyLogits

    if isinstance(logits, np.ndarray):
        return NumpyLogits(logits)
    if logits.device.type == "cpu":
        return NumpyLogits(logits.numpy())
    from .torch_logits import TorchLogits

    return TorchLogits(logits)
