"""One field of a configuration dataclass, as flags, variables, files and keywords see it."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_EXPECTED: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "NAME=VALUE pairs",
}
_NEXT_PAIR = re.compile(r",(?=\s*[\w.-]+\s*=)")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a value is checked against before the dataclass is made, wherever it was written."""

    name: str
    kind: type
    """int, float, bool, str, or dict for names with values: of the value, or of each item where ``many``."""
    optional: bool
    many: bool
    default: Any
    """``dataclasses.MISSING`` where it must be given."""
    help: str
    choices: tuple[str, ...] | None
    flag: str
    """As it is spelled on a command line."""

    def parse(self, text: str) -> Any:
        """The value a flag or variable spells; raises ``ConfigError``."""
        if self.optional and text.lower() in ("none", "null", ""):
            return None
        if self.kind is dict:
            return self._parse_pairs(text)
        if self.many:
            return tuple(self._parse_one(item) for item in (part.strip() for part in text.split(",")) if item)
        return self._parse_one(text)

    def _parse_pairs(self, text: str) -> dict[str, Any]:
        """``a=1,b=2``, or JSON where a value has such commas itself."""
        if not text.lstrip().startswith("{"):
            return dict(self.parse_pair(pair) for pair in _NEXT_PAIR.split(text))
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ConfigError(self.name, text, f"NAME=VALUE,NAME=VALUE, or JSON ({error})") from error

    def parse_pair(self, text: str) -> tuple[str, str]:
        """The name and the value of one ``NAME=VALUE``; raises ``ConfigError``."""
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(self.name, text, "NAME=VALUE")
        return name.strip(), value.strip()

    def check(self, value: Any) -> Any:
        """The value a file or a caller gives; raises ``ConfigError`` where its type is another."""
        if value is None and self.optional:
            return None
        if self.kind is dict:
            if isinstance(value, Mapping):
                return dict(value)
        elif self.many:
            items = value if isinstance(value, list | tuple) else [value]
            if all(map(self._fits, items)):
                return tuple(items)
        elif self._fits(value):
            return float(value) if self.kind is float else value
        raise ConfigError(self.name, value, self._expected)

    def _parse_one(self, text: str) -> Any:
        if self.kind is str:
            return text
        if self.kind is bool:
            if text.lower() in (*_TRUE, *_FALSE):
                return text.lower() in _TRUE
        else:
            try:
                return self.kind(text)
            except ValueError:
                pass
        raise ConfigError(self.name, text, self._expected)

    def _fits(self, value: Any) -> bool:
        kinds = (int, float) if self.kind is float else self.kind
        return isinstance(value, kinds) and isinstance(value, bool) == (self.kind is bool)

    @property
    def _expected(self) -> str:
        expected = _EXPECTED[self.kind]
        if self.many:
            expected = "a list of names" if self.kind is str else f"a list, each item {expected}"
        return expected + (" or null" if self.optional else "")


def settings_of(*configs: type[Any]) -> dict[str, Setting]:
    """The settings of these dataclasses by name, in the order of their fields.

    Raises ``TypeError`` for a field of a type that has no spelling.
    """
    result: dict[str, Setting] = {}
    for config in configs:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if not field.init:
                continue
            kind, optional, many = _kinds_of(hints[field.name], field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            result[field.name] = Setting(
                field.name,
                kind,
                optional,
                many,
                default,
                field.metadata.get("help", ""),
                field.metadata.get("choices"),
                field.metadata.get("flag", "--" + field.name.replace("_", "-")),
            )
    return result


def _kinds_of(hint: Any, name: str) -> tuple[type, bool, bool]:
    """(type, may be None, is a tuple of it) of a field's annotation."""
    optional = many = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        rest = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        optional = len(rest) < len(typing.get_args(hint))
        hint = rest[0] if len(rest) == 1 else None
    if typing.get_origin(hint) is tuple:
        hint, many = typing.get_args(hint)[0], True
    if typing.get_origin(hint) is Mapping:
        hint = dict
    if hint not in _EXPECTED:
        raise TypeError(f"field {name} is no int, float, bool, str, tuple of these, or one of them or None")
    return hint, optional, many
