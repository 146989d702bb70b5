"""What waiting requests would find in the prefix cache, remembered for as long as it stands."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.request import BlockHash
from .kv_cache_manager import KVCacheManager
from .prefix_cache import PrefixMatch


class PrefixMemory:
    """One walk along a request's hashes; after that a look costs what the cache has lost since, however long the match.

    A match stands while none of its blocks has lost its hash and no hash that would lengthen it was published. Without
    a window one hash can do that, the next one, and then the walk goes on from there. With a window a later run may
    take the place of the one that was found: any hash behind it that was missing. Under the manager's lock.

    A match is kept until its request starts or ends, however many wait: it is smaller than the hashes that the request
    itself keeps. A bound below the number of those looked at in turn would forget each just before it is looked at.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._lost = manager.cache.lost
        self._remembered: dict[int, _Remembered] = {}

    def __len__(self) -> int:
        return len(self._remembered)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._remembered

    def match(self, request_id: int, hashes: Sequence[BlockHash], num_tokens: int) -> PrefixMatch:
        """``KVCacheManager.match_prefix``, for a request whose hashes only ever get more."""
        remembered = self._remembered.get(request_id)
        if remembered is not None and remembered.num_tokens == num_tokens and remembered.num_hashes == len(hashes):
            if remembered.num_lost == self._lost.total or remembered.lost_none(self._manager):
                if not remembered.may_grow or not remembered.may_be_longer(self._manager):
                    return remembered.match
                known = remembered.match
            else:
                known = PrefixMatch()
            match = self._manager.match_prefix(hashes, num_tokens, known)
        else:
            match = self._manager.match_prefix(hashes, num_tokens)
        self._remembered[request_id] = _Remembered(match, hashes, num_tokens, self._manager)
        return match

    def forget(self, request_id: int) -> None:
        """The request started or ended."""
        self._remembered.pop(request_id, None)


class _Remembered:
    __slots__ = (
        "_blocks", "_hashes", "_missing", "_next", "_num_published", "match", "may_grow", "num_hashes", "num_lost",
        "num_tokens",
    )  # fmt: skip

    def __init__(
        self, match: PrefixMatch, hashes: Sequence[BlockHash], num_tokens: int, manager: KVCacheManager
    ) -> None:
        self.match, self.num_hashes, self.num_tokens = match, len(hashes), num_tokens
        cache, size = manager.cache, manager.block_size
        found, most = match.num_tokens // size, min(len(hashes), (num_tokens - 1) // size)
        self._next: BlockHash | None = None
        self._missing: frozenset[BlockHash] = frozenset()
        if not manager.enable_prefix_caching:
            pass
        elif manager.layout.window_span is None:
            self._next = hashes[found] if found < most else None
        else:
            self._missing = frozenset(h for h in (hashes[i] for i in range(found, most)) if cache.get(h) is None)
        self.may_grow = self._next is not None or bool(self._missing)
        self.num_lost, self._num_published = cache.lost.total, cache.published.total
        self._hashes = hashes
        self._blocks: frozenset[int] | None = None
        """Those of the match, once something was lost."""

    def lost_none(self, manager: KVCacheManager) -> bool:
        """Whether every block of the match still carries its hash: looked up among those lost since, or block by block
        where that is less."""
        lost = manager.cache.lost
        if not self.match.block_ids:
            return True
        since = lost.since(self.num_lost)
        if since is None or len(since) > len(self.match.block_ids):
            found = self.match.num_tokens // manager.block_size
            carried = map(manager.cache.hash_of.__getitem__, self.match.block_ids)
            if list(carried) != list(self._hashes[found - len(self.match.block_ids) : found]):
                return False
        else:
            if self._blocks is None:
                self._blocks = frozenset(self.match.block_ids)
            if not self._blocks.isdisjoint(since):
                return False
        self.num_lost = lost.total
        return True

    def may_be_longer(self, manager: KVCacheManager) -> bool:
        """Whether a hash that was missing is there now."""
        if self._next is not None:
            return manager.cache.get(self._next) is not None
        published = manager.cache.published
        if self._num_published == published.total:
            return False
        since = published.since(self._num_published)
        if since is None or not self._missing.isdisjoint(since):
            return True
        self._num_published = published.total
        return False
