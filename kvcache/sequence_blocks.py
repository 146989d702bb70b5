"""What the KV manager remembers of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from .block_layout import BlockLayout
from .block_pool import NULL_BLOCK


@dataclass(slots=True)
class SequenceBlocks:
    """Read and changed only by the KV manager."""

    table: list[int]
    """Block of each ``block_size`` tokens; the null block where the window has passed."""
    num_tokens: int
    """Tokens the table was last grown for: those before this position are computed or in flight."""
    num_published: int
    """Leading blocks that ``publish`` is done with."""
    num_passed: int
    """Leading entries of ``table`` that are the null block."""
    last_step: int | None
    """Newest step that wrote a published block this sequence found or made."""
    priority: int
    """Retention priority for the blocks it finds and publishes."""
    may_publish: bool
    """False once what it holds is not to be found by others any more."""

    def held(self) -> list[int]:
        """The blocks it holds, in token order."""
        return self.table[self.num_passed :]

    def passed(self, layout: BlockLayout, num_computed: int | None) -> list[int]:
        """Held blocks that no query from ``num_computed`` on can see."""
        position = self.num_tokens if num_computed is None else num_computed
        return self.table[self.num_passed : layout.passed(position)]

    def let_go(self, count: int) -> None:
        """Put the null block in place of the first ``count`` held blocks."""
        self.table[self.num_passed : self.num_passed + count] = [NULL_BLOCK] * count
        self.num_passed += count

    def check_integrity(self, layout: BlockLayout) -> None:
        """Raise ``AssertionError`` where table and counts disagree."""
        held = self.held()
        assert self.table[: self.num_passed] == [NULL_BLOCK] * self.num_passed, self
        assert NULL_BLOCK not in held, self
        assert len(set(held)) == len(held), self
        assert len(self.table) == layout.blocks(self.num_tokens), self
        assert self.num_published <= len(self.table), self
