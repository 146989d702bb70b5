"""Which stage holds which layers."""

from __future__ import annotations

from ..core.errors import ConfigError
from .decoder import StageRange
from .spec import ModelSpec


def stage_range(spec: ModelSpec, stage: int, num_stages: int, layer_split: list[int] | None = None) -> StageRange:
    """The layers of one stage; even in work unless ``layer_split`` gives the layers of each stage.

    Raises ``ConfigError`` for more stages than layers, and for a split that does not fit.
    """
    split = layer_split if layer_split is not None else even_split(spec, num_stages)
    if len(split) != num_stages or sum(split) != spec.num_layers or min(split) < 1:
        raise ConfigError(
            "layer_split", split, f"{num_stages} numbers of 1 or more that sum to the model's {spec.num_layers} layers"
        )
    start = sum(split[:stage])
    return StageRange(start, start + split[stage], spec.num_layers)


def even_split(spec: ModelSpec, num_stages: int) -> list[int]:
    """Layers of each stage, the head counted as the layers it weighs; what does not divide goes to early stages."""
    count = spec.num_layers
    if num_stages > count:
        raise ConfigError("pipeline_parallel_size", num_stages, f"at most the model's {count} layers")
    if num_stages == 1:
        return [count]
    head = spec.vocab_size * spec.hidden_size / layer_work(spec)
    others = num_stages - 1

    def slowest(last: int) -> float:
        return max(last + head, -(-(count - last) // others))

    last = min(range(1, count - others + 1), key=slowest)
    each, extra = divmod(count - last, others)
    return [each + (stage < extra) for stage in range(others)] + [last]


def layer_work(spec: ModelSpec) -> float:
    """Weights one token meets in an average layer."""
    attention = spec.hidden_size * (2 * spec.q_size + 2 * spec.kv_size)
    chosen = [layer.experts for layer in spec.layers]
    widths = [spec.intermediate_size if e is None else e.top_k * e.intermediate_size for e in chosen]
    return attention + 3 * spec.hidden_size * sum(widths) / len(widths)
