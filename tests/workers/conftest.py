"""A sampler with requests in its slots, for tests that bring the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan, TokenLogprobs
from llm_engine.workers import sampler as sampler_module
from llm_engine.workers.logits import Logits
from llm_engine.workers.sampler import BatchSampler
from llm_engine.workers.slots import SlotTable


class Bench:
    """Fills slots and samples. ``wrap`` decides whose code runs: numpy's or torch's."""

    def __init__(self, vocab_size: int, wrap: Callable[[Any], Logits], max_num_seqs: int = 80) -> None:
        self.slots = SlotTable(max_num_seqs, 512, 16)
        self.sampler = BatchSampler(self.slots, vocab_size)
        self.wrap = wrap
        self.next_positions: dict[int, int] = {}

    def start(
        self,
        slot: int,
        sampling: SamplingParams,
        prompt: Sequence[int] = (0,),
        outputs: Sequence[int] = (),
        *,
        seed: int = 0,
        choice_index: int = 0,
        stop_ids: Sequence[int] = (),
        bad_words_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        start = RequestStart(
            slot,
            slot,
            [*prompt, *outputs],
            len(prompt),
            [1],
            sampling,
            seed,
            choice_index,
            list(stop_ids),
            [list(word) for word in bad_words_ids],
        )
        self.slots.apply(StepPlan(queue=0, starts=[start]))
        self.sampler.start(start)
        self.next_positions[slot] = len(start.token_ids) - 1

    def sample(
        self, logits: NDArray[np.float32], slots: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Row i of the logits is ``slots[i]``'s (slot i where not given); they are left as they are."""
        slots = range(len(logits)) if slots is None else slots
        positions = [self.next_positions[slot] for slot in slots] if positions is None else positions
        return self.sampler.sample(logits.copy(), np.asarray(slots, np.int64), np.asarray(positions, np.int64))


@pytest.fixture(params=["numpy", "torch"])
def make_bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Bench]:
    """Makes a ``Bench`` for a size of vocabulary, over each of the implementations."""
    wrap = sampler_module.wrap
    if request.param == "torch":
        import torch

        from llm_engine.workers.torch_logits import TorchLogits

        def wrap(logits: Any) -> Logits:
            return TorchLogits(torch.from_numpy(logits))

        monkeypatch.setattr(sampler_module, "wrap", wrap)
    return lambda vocab_size: Bench(vocab_size, wrap)
