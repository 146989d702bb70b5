"""Names for what a full block holds: a hash chained over every token from the first one on.

``hash[i] = H(hash[i - 1], tokens of block i)``, so a block's hash stands for its own tokens *and* everything before
them, and equal hashes mean equal keys and values. What else changes those values, the adapter, or must keep two callers
apart, the cache salt, enters once: it is hashed into the root that the first block chains to, and the chain carries it
to every block after.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b

from ..core.request import BlockHash

HASH_BYTES = 32
_PLAIN_ROOT = blake2b(b"\x00", digest_size=HASH_BYTES).digest()


def hash_blocks(
    token_ids: Sequence[int], block_size: int, *, known: list[BlockHash] | None = None, extra: bytes | None = None
) -> list[BlockHash]:
    """Hash the full blocks of ``token_ids`` that ``known`` does not cover yet.

    ``known`` holds the hashes of the first blocks, made with the same tokens and ``extra``; it is extended *in place*
    and returned (a new list where it is not given), so one list can grow with a request. Only the tokens of new blocks
    are read. The hashes are the same in every process and on every machine.
    """
    hashes: list[BlockHash] = [] if known is None else known
    pack = _packer(block_size)
    parent: bytes = hashes[-1] if hashes else _root(extra)
    try:
        for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
            packed = pack(*token_ids[start : start + block_size])
            parent = blake2b(parent + packed, digest_size=HASH_BYTES).digest()
            hashes.append(BlockHash(parent))
    except struct.error as error:
        raise OverflowError(f"a token id is no 32-bit number: {error}") from error
    return hashes


@cache
def _packer(block_size: int) -> Callable[..., bytes]:
    """Tokens as little-endian 32-bit numbers."""
    return struct.Struct(f"<{block_size}i").pack


def extra_key(adapter_id: str | None, cache_salt: str | None) -> bytes | None:
    """What sets a request's blocks apart from those of equal tokens; ``None`` when nothing does.

    Different pairs never give the same key: each part is a presence byte, a length and the text.
    """
    if adapter_id is None and cache_salt is None:
        return None
    return b"".join(_encode(part) for part in (adapter_id, cache_salt))


def _encode(part: str | None) -> bytes:
    if part is None:
        return b"\x00"
    text = part.encode("utf-8", "surrogatepass")
    return b"\x01" + struct.pack("<I", len(text)) + text


def _root(extra: bytes | None) -> bytes:
    return _PLAIN_ROOT if extra is None else blake2b(b"\x01" + extra, digest_size=HASH_BYTES).digest()
