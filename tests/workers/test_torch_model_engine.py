"""Whether the torch engine knows a device that computes nothing any more from a step that failed."""

from __future__ import annotations

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
