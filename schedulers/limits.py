"""The numbers every micro-batch respects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Resolved settings; ``EngineCore`` refuses a plan that exceeds them, whoever made it."""

    max_num_seqs: int
    """Residents at a time."""
    max_micro_batch_seqs: int
    """Rows of one micro-batch."""
    max_num_batched_tokens: int
    """Tokens of one micro-batch."""
    chunk_unit: int
    """A chunk that does not end its prompt ends on a multiple of this, unless the micro-batch had no chunk without."""
    long_prefill_token_threshold: int | None = None
    """Longest chunk of one prompt."""
    num_draft_tokens: int = 0
    """Draft tokens beside each decode and, as far as its last block has room, each prompt's last chunk. Nothing drafts
    yet; budgets count them."""

    @property
    def unit(self) -> int:
        """``chunk_unit``, or the longest chunk where that is shorter."""
        return min(self.chunk_unit, self.long_prefill_token_threshold or self.chunk_unit)

    @property
    def tokens_per_decode(self) -> int:
        return 1 + self.num_draft_tokens
