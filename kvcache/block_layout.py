"""How tokens fall into blocks, and which blocks a sliding window has passed. Arithmetic only."""

from __future__ import annotations

from ..core.errors import ConfigError


class BlockLayout:
    """With ``sliding_window`` w a query at position p sees the positions p - w + 1 to p; without, all up to p."""

    def __init__(self, block_size: int, sliding_window: int | None = None) -> None:
        if block_size < 1:
            raise ConfigError("block_size", block_size, "1 or more")
        if sliding_window is not None and sliding_window < 1:
            raise ConfigError("sliding_window", sliding_window, "1 or more, or none")
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.window_span = None if sliding_window is None else max(1, -(-(sliding_window - 1) // block_size))
        """Blocks before a block boundary that the query at that boundary can see, one at least."""

    def blocks(self, num_tokens: int) -> int:
        """Entries of a table that reaches ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def passed(self, position: int) -> int:
        """Leading blocks that no query from ``position`` on can see."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1) // self.block_size

    def blocks_for(self, num_tokens: int, num_computed: int) -> int:
        """Blocks held while one step computes the tokens from ``num_computed`` up to ``num_tokens``."""
        total = self.blocks(num_tokens)
        return total - min(total, self.passed(num_computed))

    def peak_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """Most blocks ever held on the way to ``num_tokens``, computing at most ``max_chunk`` a step.

        The worst step starts just before the window passes a block: it needs the window, the rest of that block and the
        chunk. A chunk counts as a block at least, because growth that is not told where a step starts may think up to
        that many decoded tokens still to be computed.
        """
        if self.sliding_window is not None:
            chunk = max(max_chunk, self.block_size)
            num_tokens = min(num_tokens, self.sliding_window + self.block_size - 2 + chunk)
        return self.blocks(num_tokens)
