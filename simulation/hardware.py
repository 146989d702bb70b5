"""What a device is capable of, by the book, and how much of that programs get."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError
from ..models.layer_cost import SPEEDS, DeviceSpeed

GIB = float(1 << 30)
_GB, _TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device, which one stage has for itself."""

    memory: float
    """Bytes."""
    speed: DeviceSpeed
    """What a forward gets: the peaks times the shares that are stated beside them."""
    step_overhead: float
    """Seconds a step costs a stage beside its layers: message, inputs, sampling."""
    runtime_memory: float
    """Bytes the driver and the libraries take for themselves."""
    on_cuda: bool
    kv_share: float = 1.0
    """Of the memory that weights and activations leave, what the pool takes."""


def _gpu(memory: float, bandwidth_gb: float, tflops: float) -> Hardware:
    """``tflops``: dense 16-bit matrix products with 32-bit sums.

    The shares are what kernels commonly reach, not measured here: large products 60 % of the peak and attention 30 %,
    streams of weights 80 % of the bandwidth and scattered blocks of a cache 60 %.
    """
    bandwidth, flops = bandwidth_gb * _GB, tflops * _TERA
    return Hardware(
        memory=memory,
        speed=DeviceSpeed(
            weight_bytes=0.8 * bandwidth,
            flops=0.6 * flops,
            kv_bytes=0.6 * bandwidth,
            attention_flops=0.3 * flops,
            activation_bytes=0.8 * bandwidth,
            # A dozen kernels of some microseconds each, most of them launched while others run.
            layer_seconds=20e-6,
            logit_seconds=1e-11,
            overlaps=True,
        ),
        step_overhead=500e-6,
        runtime_memory=0.4 * _GB,
        on_cuda=True,
    )


HARDWARE = {
    # GeForce: NVIDIA's Ada whitepaper, at boost clock; sums in 32 bits run at half the rate of sums in 16.
    "rtx-4070": _gpu(12 * GIB, 504, 58.3),
    "rtx-4090": _gpu(24 * GIB, 1008, 165.2),
    # Data sheets; tensor figures there are with sparsity, twice these. SXM where there are two forms.
    "l4": _gpu(24 * GIB, 300, 121),
    "a100-40g": _gpu(40 * GIB, 1555, 312),
    "a100-80g": _gpu(80 * GIB, 2039, 312),
    "h100": _gpu(80 * GIB, 3350, 989),
    "h200": _gpu(141 * _GB, 4800, 989),
    # A core of an AVX-512 server CPU with bfloat16 and no AMX, as the layer split knows it; 16 GiB of memory, of which
    # an engine takes a quarter of what is free for its pool.
    "cpu-1core-avx512": Hardware(
        memory=16 * GIB,
        speed=SPEEDS["cpu"],
        step_overhead=300e-6,
        runtime_memory=0.5 * _GB,
        on_cuda=False,
        kv_share=0.25,
    ),
}


def _two_cores(one: Hardware) -> Hardware:
    """Arithmetic doubles; one core alone nearly exhausts the memory's bandwidth."""
    speed = one.speed
    return Hardware(
        memory=one.memory,
        speed=DeviceSpeed(
            weight_bytes=1.05 * speed.weight_bytes,
            flops=2 * speed.flops,
            kv_bytes=1.5 * speed.kv_bytes,
            attention_flops=2 * speed.attention_flops,
            activation_bytes=2 * speed.activation_bytes,
            layer_seconds=speed.layer_seconds,
            logit_seconds=0.5 * speed.logit_seconds,
        ),
        step_overhead=one.step_overhead,
        runtime_memory=one.runtime_memory,
        on_cuda=False,
        kv_share=one.kv_share,
    )


HARDWARE["cpu-2core-avx512"] = _two_cores(HARDWARE["cpu-1core-avx512"])


def find_hardware(name: str) -> Hardware:
    """A row of ``HARDWARE``. Raises ``ConfigError``."""
    if name not in HARDWARE:
        raise ConfigError("hardware", name, ", ".join(HARDWARE))
    return HARDWARE[name]
