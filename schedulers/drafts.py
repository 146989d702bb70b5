"""How many draft tokens the last chunks of prompts may carry. Nothing drafts yet; this is the rule it will keep to."""

from __future__ import annotations

from collections.abc import Iterable


def fit_drafts(
    chunks: Iterable[tuple[int, int, bool]], wanted: int, block_size: int, budget: int, longest: int | None = None
) -> list[int]:
    """Drafts of each chunk, of ``wanted``. A chunk is its tokens, the position behind it, and whether it is its
    prompt's last; others carry none.

    Drafts must not claim another block, so they end where the chunk's last one does; nor make a chunk longer than
    ``longest``; nor exceed what is left of the token budget, in order. The rule of TensorRT-LLM, which goes by the
    chunk unit instead: where a unit is several blocks, its drafts may claim some.
    """
    drafts = []
    for size, end, is_last in chunks:
        room = min(-end % block_size, budget, wanted if longest is None else longest - size)
        drafts.append(max(0, min(wanted, room)) if is_last else 0)
        budget -= drafts[-1]
    return drafts
