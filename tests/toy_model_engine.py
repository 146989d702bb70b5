"""A deterministic "language model" in numpy that really lives off its paged KV pool.

Three layers, each with its own pool. A token enters layer 0 as itself; every layer writes ``key(x, position)`` into
the pool and turns x into a hash of *all* the keys it reads back through the block table, positions 0 up to its own. So
one wrong block, position, stale entry or freed block changes every token from there on. ``expected_tokens`` computes
the same from the token ids alone, with Python integers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_engine.workers.batch import StageBatch
from llm_engine.workers.model_engine import ModelInfo, Progress

VOCAB_SIZE = 97
NUM_LAYERS = 3
_MASK = 2**64 - 1
_A, _B, _C = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

UInt64 = NDArray[np.uint64]
OnForward = Callable[[int, StageBatch], None]
"""Called with the number of the forward (0, 1, ...) before it computes: may wait, or raise to fail the step."""


class ToyModelEngine:
    """One stage of ``num_stages``, at most three. ``on_forward`` is the hook for tests that force orders or failures.

    What ``forward`` returns is overwritten by the next call, as the contract allows.
    """

    def __init__(
        self,
        stage: int = 0,
        num_stages: int = 1,
        *,
        max_model_len: int = 512,
        eos_token_ids: Sequence[int] = (),
        free_memory_bytes: int = 1 << 20,
        on_forward: OnForward | None = None,
    ) -> None:
        assert 1 <= num_stages <= NUM_LAYERS
        self.stage, self.num_stages = stage, num_stages
        self.layers = range(stage * NUM_LAYERS // num_stages, (stage + 1) * NUM_LAYERS // num_stages)
        self.max_model_len = max_model_len
        self.eos_token_ids = list(eos_token_ids)
        self.free_memory_bytes = free_memory_bytes
        self.on_forward = on_forward
        self.num_forwards = 0
        self.batches: list[StageBatch] = []
        """Every batch that was computed."""
        self.pools: list[UInt64] = []
        self.block_size = 0
        self.released = False
        self._returned: NDArray[np.uint64] | NDArray[np.float32] | None = None

    def load(self, progress: Progress | None = None) -> ModelInfo:
        weight_bytes = 100 * len(self.layers)
        if progress is not None:
            for done in range(50, weight_bytes + 1, 50):
                progress(done, weight_bytes)
        return ModelInfo(
            architecture="Toy",
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            dtype="float32",
            eos_token_ids=self.eos_token_ids,
            num_layers=len(self.layers),
            weight_bytes=weight_bytes,
            kv_bytes_per_token=8 * len(self.layers),
            free_memory_bytes=self.free_memory_bytes,
            num_parameters=25 * NUM_LAYERS,
            hidden_size=1,
        )

    def allocate(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pools = [np.zeros(num_blocks * block_size, np.uint64) for _ in self.layers]

    def forward(self, batch: StageBatch, hidden: UInt64 | None) -> UInt64 | NDArray[np.float32]:
        assert (hidden is None) == (self.stage == 0)
        if self._returned is not None:
            self._returned.fill(0)
        number, self.num_forwards = self.num_forwards, self.num_forwards + 1
        if self.on_forward is not None:
            self.on_forward(number, batch)
        self.batches.append(batch)
        x = batch.token_ids.astype(np.uint64) if hidden is None else hidden[:, 0]
        assert len(x) == batch.num_tokens
        for layer, pool in zip(self.layers, self.pools, strict=True):
            pool[batch.slot_mapping] = _keys(x, batch.positions, layer)
            x = _mix(self._sums(pool, batch), layer)
        if self.stage < self.num_stages - 1:
            self._returned = x[:, None]
        else:
            self._returned = _logits(x[batch.logit_rows])
        return self._returned

    def check_device(self) -> None:
        """Nothing breaks a toy; see ``BreakableToy``."""

    def release(self) -> None:
        self.pools = []
        self.released = True

    def _sums(self, pool: UInt64, batch: StageBatch) -> UInt64:
        """Of each token, the keys at positions up to its own, summed as read through the block tables. [T]"""
        sums = np.empty(batch.num_tokens, np.uint64)
        for row in range(batch.num_rows):
            begin, end = int(batch.query_starts[row]), int(batch.query_starts[row + 1])
            length = int(batch.kv_lens[row])
            assert int(batch.positions[end - 1]) + 1 == length
            num_blocks = -(-length // self.block_size)
            blocks = batch.block_tables[row, :num_blocks]
            keys = pool.reshape(-1, self.block_size)[blocks].reshape(-1)[:length]
            if end - begin == 1:
                sums[begin] = keys.sum(dtype=np.uint64)
            else:
                sums[begin:end] = np.cumsum(keys, dtype=np.uint64)[batch.positions[begin:end]]
        return sums


class BreakableToy(ToyModelEngine):
    """Its device breaks in a forward with ``poison`` among its tokens, or while the file ``hammer`` is there, which is
    used up by it; from then on every forward raises. That is what a broken CUDA context does."""

    def __init__(
        self, stage: int, num_stages: int, *, at: int = 0, poison: int = -1, hammer: str = "", **settings: Any
    ) -> None:
        super().__init__(stage, num_stages, **settings)
        self.is_broken = False
        self._poison, self._hammer = (poison, hammer) if at == stage else (-1, "")

    def forward(self, batch: StageBatch, hidden: UInt64 | None) -> UInt64 | NDArray[np.float32]:
        if self._hammer and os.path.exists(self._hammer):
            os.unlink(self._hammer)
            self.is_broken = True
        self.is_broken = self.is_broken or self._poison in batch.token_ids
        if self.is_broken:
            raise RuntimeError("an illegal memory access")
        return super().forward(batch, hidden)

    def check_device(self) -> None:
        if self.is_broken:
            raise RuntimeError("the context is corrupt")


class Gate:
    """An ``on_forward`` hook that holds every forward until let through."""

    def __init__(self) -> None:
        self._tickets = threading.Semaphore(0)
        self._open = threading.Event()
        self.waiting = threading.Semaphore(0)
        """Released once for each forward that arrives: ``waiting.acquire(timeout=...)`` waits for the next one."""

    def __call__(self, number: int, batch: StageBatch) -> None:
        self.waiting.release()
        while not self._open.is_set():
            if self._tickets.acquire(timeout=0.005):
                return

    def let_through(self, count: int = 1) -> None:
        self._tickets.release(count)

    def open(self) -> None:
        """Hold nothing from now on."""
        self._open.set()


def fail_on(*numbers: int, message: str = "the toy was told to fail") -> OnForward:
    """An ``on_forward`` hook that raises in the forwards with these numbers."""

    def hook(number: int, batch: StageBatch) -> None:
        if number in numbers:
            raise RuntimeError(message)

    return hook


def expected_logits(token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
    """The logits after each token of a sequence, from the definition: no pool, no batch."""
    sums = [0] * NUM_LAYERS
    return [_step(token, position, sums) for position, token in enumerate(token_ids)]


def expected_tokens(
    prompt: Sequence[int],
    count: int,
    *,
    stop_ids: Collection[int] = (),
    choose: Callable[[NDArray[np.float32], list[int]], int] = lambda logits, known: int(logits.argmax()),
) -> list[int]:
    """The right continuation: up to ``count`` tokens, the last one being the first of ``stop_ids`` if one comes.

    ``choose(logits, known tokens)`` picks a token; the likeliest one unless given.
    """
    sums = [0] * NUM_LAYERS
    for position, token in enumerate(prompt):
        logits = _step(token, position, sums)
    known = list(prompt)
    while True:
        known.append(choose(logits, known))
        if known[-1] in stop_ids or len(known) == len(prompt) + count:
            return known[len(prompt) :]
        logits = _step(known[-1], len(known) - 1, sums)


def _step(token: int, position: int, sums: list[int]) -> NDArray[np.float32]:
    x = token
    for layer in range(NUM_LAYERS):
        key = ((x + 1) * _A + (position + 1) * _B) & _MASK
        key = ((key ^ (key >> 29)) * _C + layer) & _MASK
        sums[layer] = (sums[layer] + key) & _MASK
        x = ((sums[layer] ^ (sums[layer] >> 31)) * _A + layer * _B) & _MASK
        x ^= x >> 32
    return _logits(np.array([x], np.uint64))[0]


def _keys(x: UInt64, positions: NDArray[np.int64], layer: int) -> UInt64:
    key = (x + np.uint64(1)) * np.uint64(_A) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_B)
    return (key ^ (key >> np.uint64(29))) * np.uint64(_C) + np.uint64(layer)


def _mix(sums: UInt64, layer: int) -> UInt64:
    x = (sums ^ (sums >> np.uint64(31))) * np.uint64(_A) + np.uint64(layer * _B & _MASK)
    return x ^ (x >> np.uint64(32))


def _logits(x: UInt64) -> NDArray[np.float32]:
    """[L] -> [L, VOCAB_SIZE] in [-4, 4)."""
    h = (x[:, None] + np.arange(1, VOCAB_SIZE + 1, dtype=np.uint64) * np.uint64(_B)) * np.uint64(_C)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(_A)
    return ((h >> np.uint64(40)).astype(np.float64) / 2**21 - 4).astype(np.float32)
