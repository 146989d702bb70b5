"""How large the KV pool is, and what the stages' models sum up to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ...core.errors import CapacityError, ConfigError
from ...workers.model_engine import ModelInfo


def choose_num_blocks(
    infos: Sequence[ModelInfo],
    memories: Sequence[str],
    *,
    block_size: int,
    max_num_seqs: int,
    num_kv_blocks: int | None = None,
    kv_cache_memory: int | None = None,
) -> int:
    """Blocks in the pool, the null block included; alike on every stage.

    ``num_kv_blocks`` where given, else what ``kv_cache_memory`` bytes hold over all stages, else what the free memory
    holds, at most what ``max_num_seqs`` requests of full length can use. ``memories`` names the memory of each stage:
    those that share one must all fit into what the last of them saw free. Raises ``ConfigError``, ``CapacityError``.
    """
    if num_kv_blocks is not None:
        if num_kv_blocks < 2:
            raise ConfigError("num_kv_blocks", num_kv_blocks, "2 or more: block 0 holds no request's tokens")
        return num_kv_blocks
    if kv_cache_memory is not None:
        block_bytes = max(sum(info.kv_bytes_per_token for info in infos) * block_size, 1)
        num_blocks = kv_cache_memory // block_bytes
        if num_blocks < 2:
            raise ConfigError("kv_cache_memory", kv_cache_memory, f"at least {2 * block_bytes}, for 2 blocks")
        return num_blocks
    sharing: dict[str, list[ModelInfo]] = defaultdict(list)
    for info, memory in zip(infos, memories, strict=True):
        sharing[memory].append(info)
    num_blocks = min(_fitting(group, block_size) for group in sharing.values())
    useful = max_num_seqs * -(-infos[0].max_model_len // block_size) + 1
    return min(num_blocks, useful)


def sum_up(infos: Sequence[ModelInfo]) -> ModelInfo:
    """The model as a whole, from its stages."""
    return replace(
        infos[-1],
        num_layers=sum(info.num_layers for info in infos),
        weight_bytes=sum(info.weight_bytes for info in infos),
        kv_bytes_per_token=sum(info.kv_bytes_per_token for info in infos),
        free_memory_bytes=min(info.free_memory_bytes for info in infos),
    )


def _fitting(infos: Sequence[ModelInfo], block_size: int) -> int:
    """Blocks that the stages in one memory can hold together."""
    free = min(info.free_memory_bytes for info in infos)
    block_bytes = max(sum(info.kv_bytes_per_token for info in infos) * block_size, 1)
    if free // block_bytes < 2:
        raise CapacityError(
            f"{free} bytes are free for the KV cache and 2 blocks of {block_size} tokens need "
            f"{2 * block_bytes}: free some memory, or take a smaller model, dtype or block_size"
        )
    return free // block_bytes
