"""The randomness of sampling, as a pure function of who asks for which token.

One uniform number a token, hashed from (seed, choice index, output position) with the finalizer of SplitMix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014): no generator has a state, so batching, pausing
and replay cannot change a request's noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .batch import Int64

UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: UInt64, choices: Int64, positions: Int64) -> NDArray[np.float64]:
    """[S] numbers in [0, 1), multiples of 2**-53. ``positions`` counts outputs: 0 for a request's first token."""
    state = _finalize(seeds + _GOLDEN)
    state = _finalize((state ^ choices.astype(np.uint64)) + _GOLDEN)
    state = _finalize((state ^ positions.astype(np.uint64)) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalize(state: UInt64) -> UInt64:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
