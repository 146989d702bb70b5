"""What a stage costs and holds, from the model's shape and the device's row: bound by memory or by arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.cost_model import StepShape
from ..core.errors import CapacityError
from ..models.layer_cost import embedding_seconds, head_seconds, layer_seconds
from ..models.spec import LayerSpec, ModelSpec
from .hardware import GIB, Hardware

RESERVED_TOKENS = 2048
"""Activations are reserved for so many tokens at most: a larger step computes its MLPs in pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class RooflineCost:
    """Seconds of a stage: linears and attention each take the longer of reading and computing where the device overlaps
    the two, their sum elsewhere; with a fixed overhead per layer and per step (``models.layer_cost``).

    Left out: how badly a matrix fits the tiles, clocks that fall with the heat, memory shared with other stages.
    """

    spec: ModelSpec
    hardware: Hardware
    layers: tuple[tuple[LayerSpec, int], ...]
    """Kinds of layers, and how many of each."""
    is_first: bool
    is_last: bool
    itemsize: int

    def seconds(self, shape: StepShape) -> float:
        spec, speed, size = self.spec, self.hardware.speed, self.itemsize
        total = self.hardware.step_overhead
        for layer, count in self.layers:
            total += count * layer_seconds(spec, layer, shape, speed, size)
        if self.is_first:
            total += embedding_seconds(spec, shape, speed, size)
        if self.is_last and shape.num_sampled:
            total += head_seconds(spec, shape, speed, size)
        return total


def roofline_costs(spec: ModelSpec, split: Sequence[int], hardware: Hardware, itemsize: int) -> list[RooflineCost]:
    """Of every stage, for so many layers each; stages that are alike share theirs."""
    costs: list[RooflineCost] = []
    made: dict[tuple[object, ...], RooflineCost] = {}
    for stage, layers in enumerate(_layers_of(spec, split)):
        kinds = tuple(Counter(layers).items())
        is_first, is_last = stage == 0, stage == len(split) - 1
        key = kinds, is_first, is_last
        if key not in made:
            made[key] = RooflineCost(spec, hardware, kinds, is_first, is_last, itemsize)
        costs.append(made[key])
    return costs


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a stage holds, in bytes."""

    usable: float
    """The device's memory times the share that may be used."""
    weights: float
    activations: float
    runtime: float
    kv_per_token: float

    @property
    def left(self) -> float:
        """For the cache."""
        return self.usable - self.weights - self.activations - self.runtime


def stage_memory(
    spec: ModelSpec, split: Sequence[int], hardware: Hardware, itemsize: int, max_num_batched_tokens: int, share: float
) -> list[StageMemory]:
    """Of every stage. ``share`` of the memory may be used."""
    found = []
    table = spec.vocab_size * spec.hidden_size
    # At the widest: the stream and its norm; gate, up and their product.
    width = 2 * spec.hidden_size + 3 * max(spec.intermediate_size, *(_mlp_width(layer) for layer in spec.layers))
    for stage, layers in enumerate(_layers_of(spec, split)):
        weights = sum(map(spec.num_weights, layers))
        is_first, is_last = stage == 0, stage == len(split) - 1
        weights += table * (is_first + is_last - (is_first and is_last and spec.tie_embeddings))
        found.append(
            StageMemory(
                usable=hardware.memory * share,
                weights=weights * itemsize,
                activations=min(max_num_batched_tokens, RESERVED_TOKENS) * width * itemsize,
                runtime=hardware.runtime_memory,
                kv_per_token=2 * spec.kv_size * itemsize * len(layers),
            )
        )
    return found


def num_blocks_in_memory(stages: Sequence[StageMemory], hardware: Hardware, block_size: int) -> int:
    """Blocks that fit on every stage. Raises ``CapacityError`` where a stage cannot hold its part of the model."""
    least: int | None = None
    for stage, memory in enumerate(stages):
        blocks = int(memory.left * hardware.kv_share // (memory.kv_per_token * block_size))
        if blocks < 2:
            raise CapacityError(_does_not_fit(stage, stages, hardware))
        least = blocks if least is None else min(least, blocks)
    assert least is not None
    return least


def _mlp_width(layer: LayerSpec) -> int:
    return 0 if layer.experts is None else layer.experts.top_k * layer.experts.intermediate_size


def _layers_of(spec: ModelSpec, split: Sequence[int]) -> list[tuple[LayerSpec, ...]]:
    found, first = [], 0
    for count in split:
        found.append(spec.layers[first : first + count])
        first += count
    return found


def _does_not_fit(stage: int, stages: Sequence[StageMemory], hardware: Hardware) -> str:
    memory = stages[stage]
    total = sum(each.weights for each in stages)
    devices = "1 such device" if len(stages) == 1 else f"{len(stages)} such devices"
    return (
        f"{devices} cannot hold the model: its weights take {total / GIB:.1f} GiB, and stage {stage} would need "
        f"{memory.weights / GIB:.2f} GiB for its part, {memory.activations / GIB:.2f} for activations and "
        f"{memory.runtime / GIB:.2f} for the runtime, of {memory.usable / GIB:.2f} usable of its "
        f"{hardware.memory / GIB:.0f} GiB, and at least two blocks of cache beside; take more stages or larger devices"
    )
