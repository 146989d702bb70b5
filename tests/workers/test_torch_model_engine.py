"""Whether the torch engine knows a device that computes nothing any more from a step that failed, and when the system
hands over its pool."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
import torch

from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import CapacityError
from llm_engine.models.hub import DEMO_MODEL
from llm_engine.workers.batch import StageBatch
from llm_engine.workers.torch_model_engine import TorchModelEngine
from llm_engine.workers.torch_stage import make_torch_stage


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


def resident_share(address: int, size: int) -> float:
    """Of the whole pages of some memory, how many the system has handed over."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    count = (address + size - begin) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return sum(page & 1 for page in found) / count


def tells_what_is_resident() -> bool:
    """Sandboxes say that all is."""
    with mmap.mmap(-1, 64 * mmap.PAGESIZE) as memory:
        view = ctypes.c_char.from_buffer(memory)
        share = resident_share(ctypes.addressof(view), len(memory))
        del view
    return share == 0.0


@pytest.mark.skipif(not tells_what_is_resident(), reason="the system does not say")
@pytest.mark.parametrize(
    "cache",
    [
        {"kv_cache_memory": 1 << 30},
        {"kv_cache_memory": 1 << 30, "num_kv_blocks": 6000},  # so it is when a stage starts anew
    ],
)
def test_a_pool_given_in_bytes_is_there_from_the_start(cache: dict[str, int]) -> None:
    config = EngineConfig.of(pipeline_parallel_size=2, **cache)
    made = make_torch_stage(str(DEMO_MODEL), config, 0, on_cuda=False, num_threads=None)
    try:
        made.load()
        made.allocate(6000, 16)
        assert made._decoder is not None
        for layer in made._decoder.layers:
            for tensor in (layer.attention.k_cache, layer.attention.v_cache):
                assert tensor.nbytes > 40 << 20  # the C library may have smaller ones at hand
                assert resident_share(tensor.data_ptr(), tensor.nbytes) > 0.99
    finally:
        made.release()


def test_a_pool_given_in_bytes_that_are_not_there_is_refused() -> None:
    config = EngineConfig.of(pipeline_parallel_size=2, kv_cache_memory=1 << 50)
    made = make_torch_stage(str(DEMO_MODEL), config, 1, on_cuda=False, num_threads=None)
    made.load()
    with pytest.raises(CapacityError, match=r"KV cache of stage 1 takes \d{14,} bytes and \d+ are free.*kv_cache"):
        made.allocate(1 << 34, 16)
    made.release()
