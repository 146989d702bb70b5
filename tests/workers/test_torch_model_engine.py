"""Whether the torch engine knows a device that computes nothing any more from a step that failed, and when the system
hands over its pool."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
import torch

from llm_engine.models.hub import DEMO_MODEL
from llm_engine.workers.batch import StageBatch
from llm_engine.workers.torch_model_engine import TorchModelEngine


class Failing(TorchModelEngine):
    """Raises what it is told to, with every forward."""

    error: Exception | None = None

    def forward(self, batch: StageBatch, hidden: Any) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(batch, hidden)


@pytest.fixture(params=[0, 1])
def engine(request: pytest.FixtureRequest) -> Failing:
    made = Failing(str(DEMO_MODEL), stage=request.param, num_stages=2, device="cpu")
    made.load()
    made.allocate(4, 16)
    return made


def test_a_device_that_computes_another_token_works(engine: Failing) -> None:
    one = np.zeros(1, np.int64)
    batch = StageBatch(
        1, np.full(1, 10**6), one, np.array([0, 1], np.int32), np.ones(1, np.int32), np.zeros((1, 1), np.int32), one,
        np.full(1, 5),
    )  # fmt: skip
    with pytest.raises(IndexError):
        engine.forward(batch, torch.zeros(1, 3))
    engine.check_device()


def test_a_device_that_refuses_the_simplest_step_is_broken(engine: Failing) -> None:
    engine.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.check_device()


def test_memory_that_is_short_for_now_breaks_nothing(engine: Failing) -> None:
    engine.error = torch.OutOfMemoryError("CUDA out of memory")
    engine.check_device()


def resident_share(memory: torch.Tensor) -> float:
    """Of the whole pages of a tensor, how many the system has handed over."""
    begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    count = (memory.data_ptr() + memory.nbytes - begin) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return sum(page & 1 for page in found) / count


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mincore"), reason="the system does not say")
@pytest.mark.parametrize(("take_pool", "share"), [(True, 1.0), (False, 0.0)])
def test_the_pools_memory_comes_at_the_start_or_as_it_is_written(take_pool: bool, share: float) -> None:
    made = TorchModelEngine(str(DEMO_MODEL), num_stages=2, device="cpu", take_pool=take_pool)
    made.load()
    made.allocate(6000, 16)
    assert made._decoder is not None
    for layer in made._decoder.layers:
        for cache in (layer.attention.k_cache, layer.attention.v_cache):
            assert cache.nbytes > 40 << 20  # the C library may have smaller ones at hand
            assert resident_share(cache) == pytest.approx(share, abs=0.06)
    made.release()
