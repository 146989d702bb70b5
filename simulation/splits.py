"""Layers of each stage: as told, or as an engine would split them by the times that are simulated."""

from __future__ import annotations

from collections.abc import Callable

from ..core.cost_model import StepShape
from ..core.errors import ConfigError
from ..core.stage_settings import check_split
from ..models.layer_cost import DECODE, PREFILL, LayerTimes
from ..models.layer_split import NAMED_SPLITS


def split_layers(
    num_layers: int, num_stages: int, partition: str | None, times: Callable[[StepShape], LayerTimes]
) -> tuple[int, ...]:
    """``partition`` is the setting ``pipeline_layer_partition``. Raises ``ConfigError``."""
    if num_stages > num_layers:
        raise ConfigError("stages", num_stages, f"at most the model's {num_layers} layers")
    split = check_split(num_layers, num_stages, partition)
    if isinstance(split, list):
        return tuple(split)
    if num_stages == 1:
        return (num_layers,)
    return tuple(NAMED_SPLITS[split or "auto"](times(DECODE), times(PREFILL), num_stages))
