"""What carries activations from one stage to the next, and tokens back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Link:
    """Messages go one after the other at ``bandwidth`` and arrive ``latency`` after their last byte has left."""

    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes a second."""

    def transfer_seconds(self, num_bytes: float) -> float:
        """For how long a message occupies the link."""
        return num_bytes / self.bandwidth


LINKS = {
    # Latency is one way between two processes, not between two cards' memories.
    "none": Link(0.0, math.inf),
    "lan-1g": Link(200e-6, 1e9 / 8),
    "lan-10g": Link(50e-6, 10e9 / 8),
    # 16 lanes of 16 GT/s: 31.5 GB/s by the book, about 25 in copies from card to card.
    "pcie4": Link(10e-6, 25e9),
    # Blocking zmq between two processes of one machine, copied in and out: docs/transport.md.
    "ipc": Link(54e-6, 1.4e9),
    # An A100's 12 NVLink 3 links: 300 GB/s each way; the message still passes two processes.
    "nvlink": Link(5e-6, 300e9),
}


def parse_link(text: str) -> Link:
    """A name of ``LINKS``, or ``LATENCY_US,GBIT``. Raises ``ConfigError``."""
    if text in LINKS:
        return LINKS[text]
    latency, comma, gbit = text.partition(",")
    try:
        link = Link(float(latency) / 1e6, float(gbit) * 1e9 / 8)
    except ValueError:
        link = None
    if not comma or link is None or not 0 <= link.latency < math.inf or not link.bandwidth > 0:
        raise ConfigError("link", text, f"{', '.join(LINKS)}, or LATENCY_US,GBIT such as 200,1")
    return link
