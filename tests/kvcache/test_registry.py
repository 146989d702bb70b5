"""KV managers and resources by name, and the one method of a manager that is there to be overridden."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.core.errors import ConfigError, KVCacheError
from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.kvcache.registry import check_resources, find_kv_cache_manager, make_resources
from llm_engine.kvcache.resources import BaseResourceManager

HERE = "tests.kvcache.test_registry"


class Asked(KVCacheManager):
    """Remembers what it was asked."""

    def __init__(self, num_blocks: int, block_size: int, **settings: Any) -> None:
        super().__init__(num_blocks, block_size, **settings)
        self.asked: list[tuple[int, int, bool]] = []
        self.answer: Any = 50

    def retention(self, seq_id: int, index: int, *, found: bool) -> int:
        self.asked.append((seq_id, index, found))
        return self.answer  # type: ignore[no-any-return]


class Broken(KVCacheManager):
    def __init__(self, num_blocks: int, block_size: int, **settings: Any) -> None:
        raise MemoryError("no room")


class Places(BaseResourceManager):
    name = "places"

    def needed(self, request: Any) -> int:
        return 1

    def available(self) -> int:
        return 1


class Nameless(Places):
    name = None  # type: ignore[assignment]


def two_places() -> Places:
    return Places()


def test_lru_is_the_one_that_is_built_in() -> None:
    kv = find_kv_cache_manager("lru")(8, 4, enable_prefix_caching=False, sliding_window=None)
    assert type(kv) is KVCacheManager
    assert not kv.enable_prefix_caching


def test_retention_is_asked_for_what_is_filled_and_for_what_is_found() -> None:
    kv = find_kv_cache_manager(f"{HERE}:Asked")(10, 4, enable_prefix_caching=True, sliding_window=None)
    assert type(kv).__name__ == "Asked"
    tokens = list(range(12))
    hashes = hash_blocks(tokens, 4)
    kv.add_sequence(1, hashes, 12)
    kv.grow(1, 12)
    kv.publish(1, hashes, 12, step=1)
    assert kv.asked == [(1, 0, False), (1, 1, False), (1, 2, False)]  # type: ignore[attr-defined]
    kv.asked.clear()  # type: ignore[attr-defined]
    assert kv.add_sequence(2, hashes, 12) == 8
    assert kv.asked == [(2, 0, True), (2, 1, True)]  # type: ignore[attr-defined]
    assert [kv.pool.priority(block) for block in kv.block_ids(2)] == [50, 50]
    kv.check_integrity()


@pytest.mark.parametrize("answer", [-1, 101, 1.5, None, True])
def test_a_retention_outside_the_scale_names_the_manager(answer: Any) -> None:
    kv = Asked(10, 4)
    kv.answer = answer
    hashes = hash_blocks([1, 2, 3, 4], 4)
    kv.add_sequence(1, hashes, 4)
    kv.grow(1, 4)
    with pytest.raises(KVCacheError, match=rf"Asked.retention is {answer}; allowed: 0 to 100"):
        kv.publish(1, hashes, 4, step=1)
    kv.check_integrity()


class Raising(Asked):
    def retention(self, seq_id: int, index: int, *, found: bool) -> int:
        if self.answer is None:
            raise LookupError("no such rank")
        return super().retention(seq_id, index, found=found)


@pytest.mark.parametrize("found", [False, True])
def test_a_retention_that_raises_names_the_manager_and_the_books_stand(found: bool) -> None:
    kv = Raising(10, 4)
    hashes = hash_blocks(range(8), 4)
    kv.add_sequence(1, hashes, 8)
    kv.grow(1, 8)
    if found:
        kv.publish(1, hashes, 8, step=1)
    kv.answer, free = None, kv.num_free_blocks
    says = r"Raising\.retention raised LookupError\('no such rank'\)"
    with pytest.raises(KVCacheError, match=says) as caught:
        kv.add_sequence(2, hashes, 8) if found else kv.publish(1, hashes, 8, step=1)  # type: ignore[func-returns-value]
    assert isinstance(caught.value.__cause__, LookupError)
    assert (kv.num_free_blocks, 2 in kv) == (free, False)
    kv.check_integrity()
    kv.free(1)
    kv.check_integrity()


def test_each_call_makes_resources_of_its_own() -> None:
    names = [f"{HERE}:two_places"]
    check_resources(names)
    (one,), (other,) = make_resources(names), make_resources(names)
    assert isinstance(one, Places)
    assert one is not other


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: find_kv_cache_manager(f"{HERE}:Places"), "a subclass of KVCacheManager; Places is none"),
        (lambda: find_kv_cache_manager(f"{HERE}:Broken")(8, 4), "it raised MemoryError"),
        (lambda: find_kv_cache_manager("nowhere.at:All"), "can be imported"),
        (lambda: check_resources([f"{HERE}:Asked"]), "a subclass of BaseResourceManager; Asked is none"),
        (lambda: make_resources([f"{HERE}:Nameless"]), "a resource manager with a name; this one has none"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()
