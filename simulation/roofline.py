"""What a stage costs and holds, from the model's shape and the device's row: bound by memory or by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.cost_model import StepShape
from ..models.spec import ExpertSpec, ModelSpec
from .hardware import Hardware


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer weighs, in numbers and not in bytes."""

    shared_weights: int
    """Read by every step and used by every token."""
    experts: ExpertSpec | None
    expert_weights: int
    """Of one expert."""
    kv_width: int
    """Numbers cached for a token: keys and values."""
    query_width: int
    window: int | None

    @classmethod
    def of(cls, spec: ModelSpec, index: int) -> LayerShape:
        layer, hidden = spec.layers[index], spec.hidden_size
        attention = hidden * 2 * (spec.q_size + spec.kv_size)
        experts = layer.experts
        if experts is None:
            dense, one = attention + 3 * hidden * spec.intermediate_size, 0
        else:
            dense, one = attention + hidden * experts.num_experts, 3 * hidden * experts.intermediate_size
        return cls(dense, experts, one, 2 * spec.kv_size, spec.q_size, layer.window)

    @property
    def weights(self) -> int:
        return self.shared_weights + (0 if self.experts is None else self.experts.num_experts * self.expert_weights)

    def weights_read(self, num_tokens: int) -> float:
        """By a step: of n experts, tokens that each take k at random leave n (1 - k/n)^tokens alone."""
        if self.experts is None:
            return self.shared_weights
        n, k = self.experts.num_experts, self.experts.top_k
        return self.shared_weights + self.expert_weights * n * (1.0 - (1.0 - k / n) ** num_tokens)

    @property
    def weights_used(self) -> int:
        """By a token."""
        return self.shared_weights + (0 if self.experts is None else self.experts.top_k * self.expert_weights)


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """Seconds of a stage: its linears and its attention each take the longer of reading and computing.

    Both as shares of the peaks, plus a fixed overhead per layer and per step. Left out: activations' own traffic, how
    badly a matrix fits the tiles, clocks that fall with the heat.
    """

    hardware: Hardware
    layers: tuple[tuple[LayerShape, int], ...]
    """Kinds of layers and how many of each."""
    head_weights: int
    """0 unless this is the last stage."""
    itemsize: int

    def seconds(self, shape: StepShape) -> float:
        hardware, size = self.hardware, self.itemsize
        bandwidth = hardware.bandwidth * hardware.bandwidth_share
        flops = hardware.flops * hardware.flops_share
        total = hardware.step_overhead
        for layer, count in self.layers:
            read, computed = layer.weights_read(shape.num_tokens) * size, 2.0 * layer.weights_used * shape.num_tokens
            linears = max(read / bandwidth, computed / flops)
            cached, context = shape.kv_tokens, shape.context_tokens
            if layer.window is not None:
                cached = min(cached, shape.num_rows * layer.window + shape.num_tokens)
                context = min(context, shape.num_tokens * layer.window)
            read, computed = float(cached * layer.kv_width * size), 4.0 * context * layer.query_width
            attention = max(read / bandwidth, computed / flops)
            total += count * (linears + attention + hardware.layer_overhead)
        if self.head_weights and shape.num_sampled:
            total += max(self.head_weights * size / bandwidth, 2.0 * self.head_weights * shape.num_sampled / flops)
        return total


def stage_costs(spec: ModelSpec, split: list[int], hardware: Hardware, itemsize: int) -> list[RooflineCost]:
    """Of every stage, for so many layers each."""
    costs, first = [], 0
    for stage, count in enumerate(split):
        kinds: dict[LayerShape, int] = {}
        for index in range(first, first + count):
            layer = LayerShape.of(spec, index)
            kinds[layer] = kinds.get(layer, 0) + 1
        head = spec.vocab_size * spec.hidden_size if stage == len(split) - 1 else 0
        costs.append(RooflineCost(hardware, tuple(kinds.items()), head, itemsize))
        first += count
    return costs


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage."""

    weights: float
    activations: float
    runtime: float
    kv_per_token: float


RESERVED_TOKENS = 2048
"""A larger step computes its MLPs in pieces, so that no more tokens' activations are held at a time."""


def stage_memory(
    spec: ModelSpec, split: list[int], hardware: Hardware, itemsize: int, budget: int
) -> list[StageMemory]:
    """What every stage holds beside its cache, for steps of ``budget`` tokens, and what a token of cache takes."""
    found, first = [], 0
    tokens = min(budget, RESERVED_TOKENS)
    table = spec.vocab_size * spec.hidden_size
    for stage, count in enumerate(split):
        layers = [LayerShape.of(spec, index) for index in range(first, first + count)]
        weights = sum(layer.weights for layer in layers)
        is_last = stage == len(split) - 1
        if stage == 0 or (is_last and spec.tie_embeddings):
            weights += table
        if is_last and not spec.tie_embeddings:
            weights += table
        # At the widest: the stream and its norm, gate, up and their product.
        width = 2 * spec.hidden_size + 3 * spec.intermediate_size
        found.append(
            StageMemory(
                weights=weights * itemsize,
                activations=tokens * width * itemsize,
                runtime=hardware.runtime_memory,
                kv_per_token=sum(layer.kv_width for layer in layers) * itemsize,
            )
        )
        first += count
    return found
