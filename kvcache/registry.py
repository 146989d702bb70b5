"""KV managers and resources by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..core.errors import ConfigError
from ..core.registry import Registry, check_class, make
from .kv_cache_manager import KVCacheManager
from .resources import BaseResourceManager

KV_CACHE_MANAGERS: Registry[KVCacheManager] = Registry("kv_cache_manager", "llm_engine.kv_cache_managers")
KV_CACHE_MANAGERS.add("lru", ".kvcache.kv_cache_manager:KVCacheManager", "what was freed longest ago is lost first")

RESOURCES: Registry[BaseResourceManager] = Registry("resources", "llm_engine.resources")


def find_kv_cache_manager(name: str) -> Callable[..., KVCacheManager]:
    """What makes the manager, called with the arguments of ``KVCacheManager``. Raises ``ConfigError``."""
    factory = KV_CACHE_MANAGERS.get(name)
    check_class(factory, KVCacheManager, "kv_cache_manager", name)

    def make_manager(num_blocks: int, block_size: int, **settings: object) -> KVCacheManager:
        made: KVCacheManager = make(
            factory, KVCacheManager, "kv_cache_manager", name, num_blocks, block_size, **settings
        )
        return made

    return make_manager


def check_resources(names: Iterable[str]) -> None:
    """Raise ``ConfigError`` for a name that leads to no resource manager."""
    for name in names:
        check_class(RESOURCES.get(name), BaseResourceManager, "resources", name)


def make_resources(names: Iterable[str]) -> list[BaseResourceManager]:
    """One of each, made as ``Class()``. Raises ``ConfigError``."""
    made = []
    for name in names:
        factory = RESOURCES.get(name)
        check_class(factory, BaseResourceManager, "resources", name)
        resource = make(factory, BaseResourceManager, "resources", name)
        if not isinstance(getattr(resource, "name", None), str):
            raise ConfigError("resources", name, "a resource manager with a name; this one has none")
        made.append(resource)
    return made
