"""Things chosen by a name: built-in ones, entry points of other packages, or ``package.module:Class``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import ConfigError, EngineError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to factories. Built-ins are given as ``module:attribute`` and imported when asked for."""

    def __init__(self, kind: str, group: str | None = None, base: str = "llm_engine") -> None:
        self.kind, self.group = kind, group
        self._base = base
        self._entries: dict[str, tuple[str, str]] = {}

    def add(self, name: str, target: str, summary: str = "") -> None:
        """Register ``.module:attribute`` (relative to the package) or ``package.module:attribute`` under a name."""
        self._entries[name] = (target, summary)

    def names(self) -> list[str]:
        """Built-in names in the order they were added, then entry points."""
        return [*self._entries, *(point.name for point in self._points() if point.name not in self._entries)]

    def describe(self) -> Iterator[tuple[str, str]]:
        """Each name with one line about it."""
        for name, (_, summary) in self._entries.items():
            yield name, summary
        for point in self._points():
            if point.name not in self._entries:
                yield point.name, f"from {point.value}"

    def get(self, name: str, field: str | None = None) -> Callable[..., T]:
        """The class or factory of that name; raises ``ConfigError`` naming what exists."""
        field = field or self.kind
        if name in self._entries:
            return self._load(self._entries[name][0], field)
        for point in self._points():
            if point.name == name:
                return self._load(point.value, field)
        if ":" in name:
            return self._load(name, field)
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(field, name, f"{', '.join(self.names())}, or package.module:Class{hint}")

    def _load(self, target: str, field: str) -> Callable[..., T]:
        module, _, attribute = target.partition(":")
        try:
            loaded: Any = importlib.import_module(module, self._base if module.startswith(".") else None)
            for part in attribute.split("."):
                loaded = getattr(loaded, part)
        except Exception as error:
            what = error if isinstance(error, ImportError | AttributeError | ValueError) else repr(error)
            raise ConfigError(field, target, f"something that can be imported ({what})") from error
        return loaded  # type: ignore[no-any-return]

    def _points(self) -> list[Any]:
        return sorted(entry_points(group=self.group), key=lambda p: p.name) if self.group else []


def check_class(factory: Any, base: type[Any], field: str, name: str) -> None:
    """Raise ``ConfigError`` for a class that is no whole ``base``, naming what it lacks. Whether a function makes one
    is seen when it is called (``make``)."""
    if not callable(factory):
        raise ConfigError(field, name, f"a subclass of {base.__name__}; this is {factory!r}")
    if not inspect.isclass(factory):
        return
    lacks = [member for member in _abstract(base) if not hasattr(factory, member)]
    if not issubclass(factory, base):
        lacking = f", and lacks {', '.join(lacks)}" if lacks else ""
        raise ConfigError(field, name, f"a subclass of {base.__name__}; {factory.__name__} is none{lacking}")
    if unwritten := _abstract(factory):
        raise ConfigError(field, name, f"a whole {base.__name__}; {factory.__name__} lacks {', '.join(unwritten)}")


def make(factory: Callable[..., Any], base: type[Any], field: str, name: str, *arguments: Any, **named: Any) -> Any:
    """Call it; raises ``ConfigError`` where it raises, or makes something else than a ``base``."""
    try:
        made = factory(*arguments, **named)
    except EngineError:
        raise
    except Exception as error:
        raise ConfigError(field, name, f"something that can be made; it raised {error!r}") from error
    if not isinstance(made, base):
        raise ConfigError(field, name, f"what makes one of {base.__name__}; it made {made!r}")
    return made


def _abstract(kind: type[Any]) -> list[str]:
    return sorted(getattr(kind, "__abstractmethods__", ()))
