"""The part of a stage that computes: load weights, hold the KV cache, run the layers. Replaceable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .batch import StageBatch

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while weights load."""


@dataclass(slots=True)
class ModelInfo:
    """What the engine must know of a loaded model; the same on every stage but for the memory figures."""

    architecture: str
    vocab_size: int
    max_model_len: int
    """Longest prompt + output: the model's own limit, or the setting where lower."""
    dtype: str
    eos_token_ids: list[int] = field(default_factory=list)
    sliding_window: int | None = None
    """Set only where *every* layer has a window: the widest one; older blocks can be freed."""
    num_layers: int = 0
    """Of this stage."""
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    """Of this stage's layers."""
    free_memory_bytes: int = 0
    """What this stage may spend on its KV pool, after loading."""
    num_parameters: int = 0
    hidden_size: int | None = None
    """Of what goes from stage to stage; ``None`` where the model engine does not say, and nobody checks."""
    active_share: float = 1.0
    """Of the layers' weights, what one token uses: all of them but in a mixture of experts."""


class ModelEngine(Protocol):
    """One stage's model. Called by the stage's own thread only, in this order: load, allocate, forward..., release.

    ``check_device`` may come after any ``forward``.
    """

    def load(self, progress: Progress | None = None) -> ModelInfo:
        """Build the stage's layers and read their weights. Raises ``ModelLoadError`` naming what is wrong."""

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the KV pool; block 0 is the null block: never owned by a request, safe to read."""

    def forward(self, batch: StageBatch, hidden: Any) -> Any:
        """Run the stage's layers. ``hidden`` is the previous stage's output, ``None`` on the first.

        Returns the hidden state [T, hidden_size] for the next stage, or on the last stage the logits [L, vocab_size]
        in float32 of ``batch.logit_rows``. What it returns is valid until the next call.
        """

    def check_device(self) -> None:
        """Called after a step that raised, in ``forward`` or in sampling. Raises where no other step could be computed
        either: the stage ends, and is started again where that is possible. Memory that is short for now is no reason.
        """

    def release(self) -> None:
        """Drop weights and pool. Callable twice."""
