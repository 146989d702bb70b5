"""What each layer, the embedding and the head cost on a device, estimated from their shapes before anything is loaded.

Stages load in processes of their own, each only its layers, so who holds what must be known before any of it can be
timed: hence an estimate, the same on every stage. ``benchmarks/layer_split.py`` times the real stages against it, and
what it finds can be given as ``pipeline_layer_partition``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.cost_model import StepShape
from .spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """How fast a device is at the parts of a step. Times add up unless it ``overlaps``: reading and computing overlap
    little on a CPU core, and on a GPU one of the two is nearly all of it. Only ratios matter to a split, so a slower
    device of the same kind, or one with more cores, is split alike."""

    weight_bytes: float
    """Bytes of weights read per second."""
    flops: float
    """Of the linears, per second."""
    kv_bytes: float
    """Bytes of keys and values read per second."""
    attention_flops: float
    activation_bytes: float
    """Bytes per second through norms, rotation and activation, read and written."""
    layer_seconds: float
    """Of a layer beside all that: calls, launches."""
    logit_seconds: float
    """Of a sampled row beside the head's linear, per token of the vocabulary: to float32, and the search for the
    largest."""
    overlaps: bool = False
    """Whether linears and attention read while they compute, so that the longer of the two counts and not their sum."""


SPEEDS: Mapping[str, DeviceSpeed] = {
    # One core with AVX-512 and bfloat16, no AMX: what `python -m benchmarks.layer_split --fit` makes of the 170 times
    # in benchmarks/results/layer-split.json, which it meets within 7 % (standard deviation).
    "cpu": DeviceSpeed(
        weight_bytes=28e9,
        flops=260e9,
        kv_bytes=18e9,
        attention_flops=73e9,
        activation_bytes=2.4e9,
        layer_seconds=6e-5,
        logit_seconds=8.5e-10,
    ),
    # From the published figures of an H100 SXM (3.35 TB/s, 989 TFLOP/s in bfloat16): four fifths of the one and half of
    # the other, and a dozen launches of 8 us a layer. Not measured.
    "cuda": DeviceSpeed(
        weight_bytes=2.7e12,
        flops=5e14,
        kv_bytes=2.7e12,
        attention_flops=3e14,
        activation_bytes=2.7e12,
        layer_seconds=1e-4,
        logit_seconds=1e-11,
    ),
}

DECODE = StepShape(num_tokens=32, context_tokens=32 * 256, num_sampled=32, num_rows=32, kv_tokens=32 * 256)
"""32 requests, 256 tokens into their texts: every row passes the head."""
PREFILL = StepShape(num_tokens=512, context_tokens=512 * 512, num_sampled=1, num_rows=1, kv_tokens=768)
"""The second 512 tokens of a prompt, its last: one row passes the head."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of a step by its parts."""

    embedding: float
    layers: tuple[float, ...]
    head: float
    """Final norm, head and sampling."""

    @property
    def total(self) -> float:
        return self.embedding + sum(self.layers) + self.head


def layer_times(spec: ModelSpec, shape: StepShape, speed: DeviceSpeed, itemsize: int) -> LayerTimes:
    """Estimate a step of this shape; ``itemsize`` is the bytes of a weight."""
    return LayerTimes(
        embedding=embedding_seconds(spec, shape, speed, itemsize),
        layers=tuple(layer_seconds(spec, layer, shape, speed, itemsize) for layer in spec.layers),
        head=head_seconds(spec, shape, speed, itemsize),
    )


def embedding_seconds(spec: ModelSpec, shape: StepShape, speed: DeviceSpeed, itemsize: int) -> float:
    """Of the first stage beside its layers."""
    return 2 * shape.num_tokens * spec.hidden_size * itemsize / speed.activation_bytes


def head_seconds(spec: ModelSpec, shape: StepShape, speed: DeviceSpeed, itemsize: int) -> float:
    """Of the last stage beside its layers: final norm, head and sampling."""
    hidden_bytes = spec.hidden_size * itemsize
    head = spec.vocab_size * spec.hidden_size
    read, computed = head * itemsize / speed.weight_bytes, 2 * head * shape.num_sampled / speed.flops
    rows = shape.num_sampled * (spec.vocab_size * speed.logit_seconds + 4 * hidden_bytes / speed.activation_bytes)
    return _together(speed, read, computed) + rows


def layer_seconds(spec: ModelSpec, layer: LayerSpec, shape: StepShape, speed: DeviceSpeed, itemsize: int) -> float:
    """Of one layer."""
    tokens, rows = shape.num_tokens, max(shape.num_rows, 1)
    read: float = spec.hidden_size * 2 * (spec.q_size + spec.kv_size)
    used = read
    """Weights that pass through memory in a step, and that one token meets."""
    if layer.experts is None:
        width = spec.intermediate_size
        read, used = read + 3 * spec.hidden_size * width, used + 3 * spec.hidden_size * width
    else:
        experts = layer.experts
        width = experts.top_k * experts.intermediate_size
        # Of n experts, tokens that each take k at random leave n (1 - k/n)^tokens alone.
        touched = experts.num_experts * (1.0 - (1.0 - experts.top_k / experts.num_experts) ** tokens)
        one, router = 3 * spec.hidden_size * experts.intermediate_size, spec.hidden_size * experts.num_experts
        read, used = read + router + touched * one, used + router + experts.top_k * one
    # Each half reads the stream twice and writes it once; queries pass two more times, keys and values four; then gate,
    # up and their product.
    activations = 6 * spec.hidden_size + 2 * spec.q_size + 4 * spec.kv_size + 3 * width
    window = layer.window if layer.window is not None else shape.context_tokens
    context = min(shape.context_tokens, tokens * window)
    cached = min(shape.kv_tokens, rows * window + tokens)
    linears = read * itemsize / speed.weight_bytes, 2 * used * tokens / speed.flops
    attention = 2 * cached * spec.kv_size * itemsize / speed.kv_bytes, 4 * context * spec.q_size / speed.attention_flops
    beside = tokens * activations * itemsize / speed.activation_bytes + speed.layer_seconds
    return _together(speed, *linears) + _together(speed, *attention) + beside


def _together(speed: DeviceSpeed, reading: float, computing: float) -> float:
    return max(reading, computing) if speed.overlaps else reading + computing
