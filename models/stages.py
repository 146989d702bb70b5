"""Which stage holds which layers."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.stage_settings import check_split
from .decoder import StageRange
from .layer_cost import DECODE, PREFILL, SPEEDS, layer_times
from .layer_split import NAMED_SPLITS
from .spec import ModelSpec


def stage_range(
    spec: ModelSpec,
    stage: int,
    num_stages: int,
    layer_split: Sequence[int] | str | None = None,
    *,
    device: str = "cpu",
    itemsize: int = 2,
) -> StageRange:
    """The layers of one stage. ``layer_split``: see ``choose_split``."""
    split = choose_split(spec, num_stages, layer_split, device=device, itemsize=itemsize)
    start = sum(split[:stage])
    return StageRange(start, start + split[stage], spec.num_layers)


def choose_split(
    spec: ModelSpec,
    num_stages: int,
    layer_split: Sequence[int] | str | None = None,
    *,
    device: str = "cpu",
    itemsize: int = 2,
) -> list[int]:
    """Layers of each stage: the numbers given, or the split of a name in ``core.stage_settings.SPLIT_NAMES``, by
    estimated time; the automatic one when absent. ``layer_split`` may be the setting as it is spelled, or the numbers.

    The same on every stage for the same arguments. ``device`` is the kind that computes (cpu, cuda), ``itemsize`` the
    bytes of a weight. Raises ``ConfigError`` for more stages than layers, and for numbers that do not fit.
    """
    split = check_split(spec.num_layers, num_stages, layer_split)
    if isinstance(split, list):
        return split
    if num_stages == 1:
        return [spec.num_layers]
    decode, prefill = (layer_times(spec, shape, SPEEDS[device], itemsize) for shape in (DECODE, PREFILL))
    return NAMED_SPLITS[split or "auto"](decode, prefill, num_stages)
