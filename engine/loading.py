"""Where a model comes from: its folder, its tokenizer, its stages. torch is imported only when a stage is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..core.config import EngineConfig, ModelConfig
from ..workers.model_engine import ModelEngine, Progress
from .tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint that was found. ``path`` is ``None`` where the caller brings the model itself."""

    path: str | None
    name: str
    default_sampling: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer(self, config: ModelConfig) -> Tokenizer | None:
        """Not loaded yet; ``None`` where there is nothing to load it from: such an engine speaks token ids only."""
        if config.tokenizer is not None:
            return Tokenizer(config.tokenizer, cache_dir=config.download_dir)
        if self.path is None or not any(os.path.exists(os.path.join(self.path, name)) for name in _TOKENIZER_FILES):
            return None
        return Tokenizer(self.path)

    def on_cuda(self, config: ModelConfig) -> bool:
        """Whether the stages will run on CUDA."""
        if self.path is None or config.device == "cpu":
            return False
        import torch

        return config.device == "cuda" or torch.cuda.is_available()

    def model_engines(self, config: EngineConfig, on_cuda: bool) -> Callable[[int], ModelEngine]:
        """Makes the model of a stage; called in the stage's thread."""
        path, stages = self.path, config.parallel.pipeline_parallel_size
        assert path is not None
        # Stages in one process share its cores; a single one takes what torch takes by itself.
        num_threads = config.parallel.cpu_threads
        if num_threads is None and stages > 1:
            num_threads = max(len(os.sched_getaffinity(0)) // stages, 1)

        def make(stage: int) -> ModelEngine:
            from ..workers.torch_model_engine import TorchModelEngine

            return TorchModelEngine(
                path,
                stage=stage,
                num_stages=stages,
                dtype=config.model.dtype,
                device="cuda" if on_cuda else "cpu",
                max_model_len=config.model.max_model_len,
                memory_utilization=config.cache.gpu_memory_utilization,
                num_threads=num_threads,
            )

        return make


def find_model(config: ModelConfig) -> ModelSource:
    """Resolve the folder, fetching from the hub where it must. Raises ``ModelLoadError``."""
    from ..models.config import read_config
    from ..models.generation import read_generation_defaults
    from ..models.hub import resolve_model

    path = resolve_model(config.model, revision=config.revision, download_dir=config.download_dir)
    defaults = read_generation_defaults(path, read_config(path))
    return ModelSource(str(path), config.model or "demo", defaults.sampling)


@contextmanager
def loading_bar(shown: bool) -> Iterator[Progress | None]:
    """A progress bar over the bytes of the weights."""
    if not shown:
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="Loading weights", unit="B", unit_scale=True, dynamic_ncols=True) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
