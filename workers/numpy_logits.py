"""Sampling in numpy. On the CPU its argmax, maxima and partial sums are several times faster than torch's.

Sorting a vocabulary costs 0.6 ms a row, so truncated rows are drawn from few *candidates*: the vocabulary is dealt into
blocks, and since each of the m largest block maxima is a logit, the m-th of them is a lower bound for the m-th largest
logit. What is below that bound cannot matter for ``top_k <= m``, nor for ``top_p`` if the candidates reach its share.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .batch import Int64
from .logits import Draws, Float32, Float64, Scores

_NUM_BLOCKS = 512
_FEW = 64
_SUM_BLOCK = 128
_NUM_BANDS = 1024
_DEPTH = np.float32(24.0)
"""Natural logarithms below the largest weight that the bands cover; the last band takes the rest."""
_SHALLOW = np.float32(1e-30)
_NOTHING = np.float32(-np.inf)
_LOWEST = np.finfo(np.float32).min
_MAX_ELEMENTS = 1 << 20
"""Of a temporary array; larger jobs are done in slices of rows, which the cache holds better."""


class NumpyLogits:
    """``Logits`` over a numpy array."""

    def __init__(self, values: Float32) -> None:
        self._values = values

    @property
    def vocab_size(self) -> int:
        return int(self._values.shape[1])

    def take(self, rows: Int64) -> NumpyLogits:
        return NumpyLogits(self._values[rows])

    def argmax(self) -> Int64:
        tokens: Int64 = self._values.argmax(axis=1)
        return tokens

    def get(self, rows: Int64, ids: Int64) -> Float32:
        return self._values[rows, ids]

    def put(self, rows: Int64, ids: Int64, values: Float32 | float) -> None:
        self._values[rows, ids] = values

    def keep_only(self, row: int, ids: Int64) -> None:
        kept = self._values[row, ids]
        self._values[row] = -np.inf
        self._values[row, ids] = kept

    def draw(self, rows: Int64, draws: Draws) -> Int64:
        tokens = np.empty(len(rows), np.int64)
        step = max(_MAX_ELEMENTS // self.vocab_size, 1)
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            tokens[part] = _draw(self._values[rows[part]], draws.take(np.arange(len(rows))[part]))
        return tokens

    def score(self, tokens: Int64, num_top: int) -> Scores:
        step = max(_MAX_ELEMENTS // self.vocab_size, 1)
        parts = [
            _score(self._values[begin : begin + step], tokens[begin : begin + step], num_top)
            for begin in range(0, len(tokens), step)
        ]
        return Scores(
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.ranks for part in parts]),
            np.concatenate([part.top_ids for part in parts]),
            np.concatenate([part.top_logprobs for part in parts]),
        )


def _draw(x: Float32, draws: Draws) -> Int64:
    """Draw every row of x [R, V]."""
    num_rows, vocab_size = x.shape
    tokens = np.full(num_rows, -1, np.int64)
    largest = x.max(axis=1)
    has_top_k = (draws.top_k > 0) & (draws.top_k < vocab_size)
    is_cut = has_top_k | (draws.top_p < 1.0)
    totals = np.zeros(num_rows)
    whole = np.flatnonzero(~has_top_k)  # top_p's share, if any, is of the whole vocabulary
    if len(whole):
        weights = _weights(x[whole], largest[whole], draws.temperature[whole])
        if draws.min_p[whole].any():
            weights *= weights >= draws.min_p[whole, None]
        running = _block_sums(weights).cumsum(axis=1)
        totals[whole] = running[:, -1]
        uncut = np.flatnonzero(~is_cut[whole])
        if len(uncut):
            rows = whole[uncut]
            tokens[rows] = _search(weights, uncut, running[uncut], draws.uniform[rows])

    left = np.flatnonzero(is_cut)
    if vocab_size > 2 * _NUM_BLOCKS:
        for count in (_FEW, _NUM_BLOCKS):
            fits = left[np.where(has_top_k[left], draws.top_k[left] <= count, count == _FEW)]
            if len(fits):
                logits, ids = _candidates(x[fits], count, floor=_LOWEST)
                tokens[fits] = _draw_cut(logits, ids, largest[fits], draws.take(fits), has_top_k[fits], totals[fits])
                left = left[tokens[left] < 0]
        wide = left[~has_top_k[left] & (totals[left] > 0)]
        if len(wide):
            tokens[wide] = _draw_wide(x[wide], largest[wide], draws.take(wide), totals[wide])
            left = left[tokens[left] < 0]
    if len(left):
        ids = np.broadcast_to(np.arange(vocab_size), (len(left), vocab_size))
        tokens[left] = _draw_cut(
            x[left], ids, largest[left], draws.take(left), has_top_k[left], totals[left], all_in=True
        )
    bad = np.flatnonzero(tokens < 0)
    tokens[bad] = x[bad].argmax(axis=1)
    return tokens


def _draw_cut(
    logits: Float32,
    ids: Int64,
    largest: Float32,
    draws: Draws,
    has_top_k: NDArray[np.bool_],
    totals: Float64,
    all_in: bool = False,
) -> Int64:
    """Draw from candidates [R, C], ids ascending, padded with -inf; -1 where they do not reach ``top_p``'s share.

    ``totals`` [R] is the weight that ``top_p`` is a share of, where there is no ``top_k``. ``all_in`` says that there
    are no further candidates.
    """
    num_rows, num_candidates = logits.shape
    at = np.arange(num_rows)
    ordered = -np.sort(-logits, axis=1)
    weights = _weights(ordered, largest, draws.temperature)
    running = weights.cumsum(axis=1, dtype=np.float64)
    limit = np.where(has_top_k, np.minimum(draws.top_k, num_candidates), num_candidates)
    limit = np.minimum(limit, (weights >= draws.min_p[:, None]).sum(axis=1))
    totals = np.where(has_top_k, running[at, np.maximum(limit, 1) - 1], totals)
    share = np.where(draws.top_p < 1.0, draws.top_p * totals, np.inf)
    # A token is kept while those before it fall short of the share.
    kept = np.minimum(1 + (running[:, :-1] < share[:, None]).sum(axis=1), limit)
    enough = (has_top_k | (running[:, -1] >= share) | all_in) & (totals > 0) & (kept > 0)
    weights = _weights(logits, largest, draws.temperature)
    weights *= _likeliest(logits, ordered[at, np.maximum(kept, 1) - 1], kept)
    running = weights.cumsum(axis=1, dtype=np.float64)
    chosen = (running <= (draws.uniform * running[:, -1])[:, None]).sum(axis=1)
    return np.where(enough, ids[at, np.minimum(chosen, num_candidates - 1)], -1)


def _draw_wide(x: Float32, largest: Float32, draws: Draws, totals: Float64) -> Int64:
    """Draw rows [R, V] whose ``top_p`` takes in much of the vocabulary; they have no ``top_k`` and weigh something.

    A histogram of the weights over bands of logits finds the band in which the share is reached; only that is sorted.
    """
    num_rows = len(x)
    at = np.arange(num_rows)
    weights = _weights(x, largest, draws.temperature)
    weights *= weights >= draws.min_p[:, None]
    depth = np.clip(largest - x.min(axis=1), _SHALLOW, _DEPTH * draws.temperature)
    bands = (largest[:, None] - x) * (np.float32(_NUM_BANDS - 1) / depth)[:, None]
    bands = np.minimum(bands, _NUM_BANDS - 1, out=bands).astype(np.int64)
    flat = (bands + (at * _NUM_BANDS)[:, None]).ravel()
    masses = np.bincount(flat, weights.ravel().astype(np.float64), num_rows * _NUM_BANDS)
    running = masses.reshape(num_rows, _NUM_BANDS).cumsum(axis=1)
    share = draws.top_p * totals
    band = np.minimum((running < share[:, None]).sum(axis=1), _NUM_BANDS - 1)
    before = np.where(band > 0, running[at, band - 1], 0.0)
    inside, _ = _gather(x, bands == band[:, None])
    inside = -np.sort(-inside, axis=1)
    inner = _weights(inside, largest, draws.temperature)
    sums = before[:, None] + inner.cumsum(axis=1, dtype=np.float64)
    kept = np.minimum(1 + (sums[:, :-1] < share[:, None]).sum(axis=1), np.maximum((inner > 0).sum(axis=1), 1))
    weights *= _likeliest(x, inside[at, kept - 1], kept + (bands < band[:, None]).sum(axis=1))
    return _search(weights, at, _block_sums(weights).cumsum(axis=1), draws.uniform)


def _likeliest(logits: Float32, last: Float32, count: Int64) -> NDArray[np.bool_]:
    """[R, C] the ``count`` likeliest of each row, the smallest of them being ``last``: of its equals the first ones."""
    above, equal = logits > last[:, None], logits == last[:, None]
    room = count - above.sum(axis=1)
    crowded = np.flatnonzero(equal.sum(axis=1) > room)
    if len(crowded):
        equal[crowded] &= equal[crowded].cumsum(axis=1) <= room[crowded, None]
    return above | equal


def _weights(x: Float32, largest: Float32, temperature: Float32) -> Float32:
    """[R, C], 1 for the largest logit. Rows without a finite largest logit come out as zeros."""
    finite = np.isfinite(largest)
    with np.errstate(over="ignore"):
        scaled = x - np.where(finite, largest, 0.0)[:, None]
        scaled /= temperature[:, None]
    scaled[~finite] = -np.inf
    return np.exp(scaled, out=scaled)


def _block_sums(weights: Float32) -> Float64:
    """[R, V] -> [R, blocks] in float64; the last block may be short."""
    num_rows, vocab_size = weights.shape
    even = vocab_size // _SUM_BLOCK * _SUM_BLOCK
    sums: Float64 = np.einsum("rbi->rb", weights[:, :even].reshape(num_rows, -1, _SUM_BLOCK), dtype=np.float64)
    if even < vocab_size:
        sums = np.concatenate([sums, weights[:, even:].sum(axis=1, dtype=np.float64)[:, None]], axis=1)
    return sums


def _search(weights: Float32, rows: Int64, running: Float64, uniform: Float64) -> Int64:
    """The id where the running sum of ``weights[rows]`` exceeds ``uniform`` of its total; -1 where the total is 0.

    ``running`` [R, blocks] are the running sums at the ends of the blocks.
    """
    vocab_size = weights.shape[1]
    target = uniform * running[:, -1]
    at = np.arange(len(rows))
    block = np.minimum((running <= target[:, None]).sum(axis=1), running.shape[1] - 1)
    before = np.where(block > 0, running[at, block - 1], 0.0)
    ids = block[:, None] * _SUM_BLOCK + np.arange(_SUM_BLOCK)
    inside = np.where(ids < vocab_size, weights[rows[:, None], np.minimum(ids, vocab_size - 1)], 0.0)
    sums = before[:, None] + inside.cumsum(axis=1, dtype=np.float64)
    chosen = (sums <= target[:, None]).sum(axis=1)
    # The block's own sum may be rounded apart from this one: then it is the block's last id that weighs anything.
    last = _SUM_BLOCK - 1 - (inside[:, ::-1] > 0).argmax(axis=1)
    return np.where(running[:, -1] > 0, ids[at, np.minimum(chosen, last)], -1)


def _candidates(x: Float32, count: int, floor: np.float32 = _NOTHING) -> tuple[Float32, Int64]:
    """[R, C] at least the ``count`` largest logits of each row and their ids, ids ascending, padded with -inf.

    Those below ``floor`` are left out.
    """
    num_rows, vocab_size = x.shape
    even = vocab_size // _NUM_BLOCKS * _NUM_BLOCKS
    maxima = x[:, :even].reshape(num_rows, -1, _NUM_BLOCKS).max(axis=1)
    bounds = np.partition(maxima, _NUM_BLOCKS - count, axis=1)[:, _NUM_BLOCKS - count]
    return _gather(x, x >= np.maximum(bounds, floor)[:, None])


def _gather(x: Float32, mask: NDArray[np.bool_]) -> tuple[Float32, Int64]:
    """[R, C] the logits under the mask and their ids, ids ascending, padded with -inf."""
    num_rows, vocab_size = x.shape
    rows, columns = np.divmod(np.flatnonzero(mask), vocab_size)
    counts = np.bincount(rows, minlength=num_rows)
    places = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
    logits = np.full((num_rows, max(int(counts.max(initial=0)), 1)), -np.inf, np.float32)
    ids = np.zeros(logits.shape, np.int64)
    logits[rows, places] = x[rows, columns]
    ids[rows, places] = columns
    return logits, ids


def _score(x: Float32, tokens: Int64, num_top: int) -> Scores:
    num_rows, vocab_size = x.shape
    at = np.arange(num_rows)
    largest = x.max(axis=1)
    with np.errstate(invalid="ignore"):
        totals = np.einsum("rv->r", np.exp(x - largest[:, None]), dtype=np.float64)
    norm = largest + np.log(totals)
    own = x[at, tokens]
    ranks = 1 + (x > own[:, None]).sum(axis=1)
    if not num_top:
        return Scores(own - norm, ranks, np.empty((num_rows, 0), np.int64), np.empty((num_rows, 0)))
    if vocab_size > 2 * _NUM_BLOCKS:
        logits, ids = _candidates(x, num_top)
    else:
        logits, ids = x, np.broadcast_to(np.arange(vocab_size), x.shape)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    top_ids, top = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logits, order, axis=1)
    return Scores(own - norm, ranks, top_ids, top - norm[:, None])
