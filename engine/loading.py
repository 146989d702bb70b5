"""Where a model comes from: its folder, its tokenizer, its stages. torch is imported only when a stage is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..core.config import EngineConfig, ModelConfig
from ..core.errors import ConfigError
from ..core.stage_settings import check_split
from ..workers.model_engine import ModelEngine, Progress
from ..workers.placement import place_stages, read_cores
from .tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint that was found. ``path`` is ``None`` where the caller brings the model itself."""

    path: str | None
    name: str
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int | None = None
    """Where the checkpoint's config says it plainly."""

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
        """Makes the model of a stage; called in the stage's thread. Raises ``ConfigError`` for settings of stages that
        do not fit the model or the machine."""
        path, parallel = self.path, config.parallel
        assert path is not None
        if self.num_layers is not None:
            check_split(self.num_layers, parallel.pipeline_parallel_size, parallel.pipeline_layer_partition)
        if parallel.stage_devices is not None and not on_cuda:
            raise ConfigError("stage_devices", parallel.stage_devices, "nothing where stages compute on the CPU")
        placements = place_stages(parallel, read_cores())

        def make(stage: int) -> ModelEngine:
            from ..workers.torch_stage import make_torch_stage

            return make_torch_stage(path, config, stage, on_cuda=on_cuda, num_threads=placements[stage].num_threads)

        return make


def find_model(config: ModelConfig) -> ModelSource:
    """Resolve the folder, fetching from the hub where it must. Raises ``ModelLoadError``."""
    from ..models.config import read_config
    from ..models.generation import read_generation_defaults
    from ..models.hub import resolve_model

    path = resolve_model(config.model, revision=config.revision, download_dir=config.download_dir)
    checkpoint = read_config(path)
    defaults = read_generation_defaults(path, checkpoint)
    num_layers = checkpoint.get("num_hidden_layers")
    return ModelSource(
        str(path), config.model or "demo", defaults.sampling, num_layers if isinstance(num_layers, int) else None
    )


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
