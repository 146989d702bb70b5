"""OpenVINO GenAI's ``ContinuousBatchingPipeline`` in bf16, on a checkpoint that optimum has converted.

The conversion is kept in the cache folder. The KV cache has the type that OpenVINO chooses on this CPU by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Run, serve, use_threads, versions


class OpenVinoGenai:
    """The pipeline, driven a step at a time as its own ``generate`` drives it, to see when first tokens come."""

    packages = ("openvino-genai", "openvino", "optimum-intel", "transformers", "torch")

    def __init__(self, args: argparse.Namespace) -> None:
        use_threads(args.threads)
        folder = converted(args.model, args.cache, self.packages)
        import openvino
        import openvino_genai

        self._tensor: Any = openvino.Tensor
        self._make_config: Any = openvino_genai.GenerationConfig
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = args.kv_gib
        scheduling.enable_prefix_caching = True
        properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": args.threads}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduling, "CPU", properties)
        self._next_id = 0

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        """Implements ``Contender``."""
        import numpy as np

        config = self._make_config()
        config.max_new_tokens = output_tokens
        config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [self._tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        start = time.perf_counter()
        handles = [self._pipeline.add_request(self._next_id + i, one, config) for i, one in enumerate(tensors)]
        self._next_id += len(handles)
        tokens, first, last = [0] * len(handles), [0.0] * len(handles), [0.0] * len(handles)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - start
            for i, handle in enumerate(handles):
                if handle.can_read():
                    new = sum(len(output.generated_ids) for output in handle.read().values())
                    first[i] = first[i] if tokens[i] else now
                    last[i] = now
                    tokens[i] += new
        return Run(time.perf_counter() - start, first, last, tokens)


def converted(model: Path, cache: Path, packages: tuple[str, ...]) -> Path:
    """The checkpoint in OpenVINO's format; converts it where this version has not done so yet."""
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model.glob("*.safetensors"))
    ]
    key = hashlib.sha256(repr((weights, (model / "config.json").read_text(), versions(packages))).encode())
    folder = cache / f"openvino-{model.name}-{key.hexdigest()[:16]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        task = ["--task", "text-generation-with-past"]
        subprocess.run([*command, "--model", str(model), *task, unfinished], check=True, stdout=sys.stderr)
        os.rename(unfinished, folder)
        os.mkdir(unfinished)  # for the context manager to remove
    return folder


if __name__ == "__main__":
    serve(OpenVinoGenai)
