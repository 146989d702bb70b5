"""What a device is capable of, by the book, and how much of that programs get."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError

GB = 1e9
GIB = float(1 << 30)
TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device. ``bandwidth`` and ``flops`` are peaks; a roofline takes the stated shares of them."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second from the memory that holds weights and cache."""
    flops: float
    """Dense 16-bit matrix products with 32-bit sums, a second."""
    bandwidth_share: float
    """Of the bandwidth, what a forward reads with."""
    flops_share: float
    """Of the peak, what large matrix products reach."""
    layer_overhead: float
    """Seconds a layer costs beside reading and computing: launches, norms, rotation."""
    step_overhead: float
    """Seconds a step costs a stage before and after its layers: inputs, sampling, launches."""
    runtime_memory: float
    """Bytes the driver and the libraries take for themselves."""
    on_cuda: bool = True


def _gpu(memory_gib: float, bandwidth_gb: float, tflops: float) -> Hardware:
    return Hardware(
        memory=memory_gib * GIB,
        bandwidth=bandwidth_gb * GB,
        flops=tflops * TERA,
        bandwidth_share=0.8,
        flops_share=0.6,
        # A dozen kernels, most of them launched while others run.
        layer_overhead=20e-6,
        step_overhead=500e-6,
        runtime_memory=0.4 * GB,
    )


HARDWARE = {
    "rtx-4070": _gpu(12, 504, 58.3),
    "rtx-4090": _gpu(24, 1008, 165.2),
    "l4": _gpu(24, 300, 121),
    "a100-40g": _gpu(40, 1555, 312),
    "a100-80g": _gpu(80, 2039, 312),
    "h100": _gpu(80, 3350, 989),
    "h200": _gpu(141e9 / GIB, 4800, 989),
}


def find_hardware(name: str) -> Hardware:
    """A row of ``HARDWARE``. Raises ``ConfigError``."""
    if name not in HARDWARE:
        raise ConfigError("hardware", name, ", ".join(HARDWARE))
    return HARDWARE[name]
