"""transformers' ``generate`` on one static batch: what a script without an engine does."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.peers.protocol import Run, serve, use_threads


class TransformersStatic:
    """The model in bf16. All prompts of a workload have one length, so the batch needs no padding."""

    packages = ("transformers", "torch")

    def __init__(self, args: argparse.Namespace) -> None:
        use_threads(args.threads)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(args.threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        """Implements ``Contender``."""
        batch = self._torch.tensor(prompts)
        clock = _StepClock()
        start = time.perf_counter()
        with self._torch.inference_mode():
            tokens = self._model.generate(
                batch,
                attention_mask=self._torch.ones_like(batch),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                streamer=clock,
            )
        total = time.perf_counter() - start
        # The first entry is the prompt itself.
        steps = [at - start for at in clock.times[1:]]
        count = len(prompts)
        return Run(total, [steps[0]] * count, [steps[-1]] * count, [tokens.shape[1] - batch.shape[1]] * count)


class _StepClock:
    """A streamer that notes when each step's tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing was held back."""


if __name__ == "__main__":
    serve(TransformersStatic)
