"""Flags, environment and file, all derived from the fields of the configuration dataclasses.

A setting comes from its flag, else from ``LLM_ENGINE_<NAME>``, else from the YAML file, else its default. What nobody
knows is refused with the nearest known name, wherever it was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.config import PARTS
from ..core.errors import ConfigError
from ..server.config import ServerConfig
from ..simulation.config import SimulationConfig

ENV_PREFIX = "LLM_ENGINE_"
ENV_INTERNAL = frozenset({"NATIVE"})
"""Variables that parts of the engine read by themselves; they are no settings."""

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_SHORT = {"pipeline_parallel_size": ("-pp",)}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class UnknownSettingError(ConfigError):
    """Nobody knows a setting of that name; the message says which one is near."""

    def __init__(self, spelled: str, where: str, known: Iterable[str]) -> None:
        super().__init__(spelled, None, "known settings")
        hint = nearest(spelled, known)
        self.args = (f"unknown {where} {spelled}" + (f"; {hint}" if hint else ""),)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a configuration dataclass, as flags, variables and files see it."""

    name: str
    kind: type
    """int, float, bool or str: of the value, or of each item where ``many``."""
    optional: bool
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value a flag or variable spells; raises ``ConfigError``."""
        if self.optional and text.lower() in ("none", "null", ""):
            return None
        if self.many:
            return tuple(item for item in (part.strip() for part in text.split(",")) if item)
        if self.kind is bool:
            if text.lower() in (*_TRUE, *_FALSE):
                return text.lower() in _TRUE
        elif self.kind is str:
            return text
        else:
            try:
                return self.kind(text)
            except ValueError:
                pass
        raise ConfigError(self.name, text, self._expected)

    def check(self, value: Any) -> Any:
        """The value a YAML file gives; raises ``ConfigError`` where its type is another."""
        if value is None and self.optional:
            return None
        if self.many:
            items = value if isinstance(value, list) else [value]
            if all(isinstance(item, self.kind) for item in items):
                return tuple(items)
        elif self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, self.kind) and isinstance(value, bool) == (self.kind is bool):
            return value
        raise ConfigError(self.name, value, self._expected)

    @property
    def _expected(self) -> str:
        return ("a list of names" if self.many else _EXPECTED[self.kind]) + (" or null" if self.optional else "")


def settings_of(*configs: type[Any]) -> dict[str, Setting]:
    """The settings of these dataclasses by name, in the order of their fields."""
    result: dict[str, Setting] = {}
    for config in configs:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kinds, optional, many = _kinds_of(hints[field.name])
            result[field.name] = Setting(
                field.name, kinds, optional, many, field.default, field.metadata["help"], field.metadata.get("choices")
            )
    return result


def _kinds_of(hint: Any) -> tuple[type, bool, bool]:
    """(type, may be None, is a tuple of it) of a field's annotation."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        rest = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        assert len(rest) == 1, hint
        return rest[0], True, False
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], False, True
    return hint, False, False


ENGINE_SETTINGS = settings_of(*PARTS.values())
SERVER_SETTINGS = settings_of(ServerConfig)
SIMULATION_SETTINGS = settings_of(SimulationConfig)
ALL_SETTINGS = {**ENGINE_SETTINGS, **SERVER_SETTINGS, **SIMULATION_SETTINGS}


def add_flags(parser: argparse._ActionsContainer, settings: Mapping[str, Setting]) -> None:
    """Give the parser a flag per setting. Flags that are not given leave no trace in the namespace."""
    for setting in settings.values():
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": _help(setting)}
        if setting.kind is bool:
            parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
            continue
        options["metavar"] = None if setting.choices else _METAVARS[setting.kind]
        if setting.many:
            parser.add_argument(setting.flag, nargs="+", **options)
        else:
            flags = [setting.flag, *_SHORT.get(setting.name, ())]
            parser.add_argument(*flags, type=_flag_type(setting), choices=setting.choices, **options)


def _help(setting: Setting) -> str:
    text = setting.help.replace("%", "%%")
    if setting.default in (None, ()):
        return text
    shown = str(setting.default).lower() if setting.kind is bool else setting.default
    return f"{text} (default: {shown})"


def _flag_type(setting: Setting) -> Any:
    def parse(text: str) -> Any:
        try:
            return setting.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(f"{error.value!r}; allowed: {error.allowed}") from error

    return parse


def resolve(
    wanted: Mapping[str, Setting], flags: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """What was set for the wanted settings, by flag, environment or ``--config`` file; defaults are left out.

    Names that only another command knows are accepted and left out too, so that one file serves all commands. Raises
    ``ConfigError`` for an unknown name or a value of the wrong type.
    """
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): text for name, text in environ.items() if name.startswith(ENV_PREFIX)
    }
    for name in variables:
        if name.upper() not in ENV_INTERNAL and name != "config" and name not in ALL_SETTINGS:
            known = [ENV_PREFIX + known.upper() for known in ALL_SETTINGS]
            raise UnknownSettingError(ENV_PREFIX + name.upper(), "environment variable", known)
    path = getattr(flags, "config", None) or variables.get("config")
    written = _read_file(path) if path else {}
    result: dict[str, Any] = {}
    for name, setting in wanted.items():
        if hasattr(flags, name):
            value = getattr(flags, name)
            result[name] = tuple(value) if setting.many else value
        elif name in variables:
            result[name] = setting.parse(variables[name])
        elif name in written:
            result[name] = setting.check(written[name])
    return result


def _read_file(path: str) -> dict[str, Any]:
    import yaml  # here, because most runs have no file

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError("config", path, f"a file that can be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError("config", path, f"a YAML file ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError("config", path, "a YAML file of 'name: value' lines")
    result: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in ALL_SETTINGS:
            raise UnknownSettingError(key, f"setting in {path}:", ALL_SETTINGS)
        result[name] = value
    return result


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""
