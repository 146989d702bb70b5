"""Flags, environment and file, all derived from the fields of the configuration dataclasses.

A setting comes from its flag, else from ``LLM_ENGINE_<NAME>``, else from the YAML file, else its default. What nobody
knows is refused with the nearest known name, wherever it was written.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..core.config import PARTS
from ..core.errors import ConfigError
from ..core.setting import Setting, settings_of
from ..server.config import ServerConfig
from ..simulation.config import SimulationConfig

ENV_PREFIX = "LLM_ENGINE_"
ENV_INTERNAL = frozenset({"NATIVE"})
"""Variables that parts of the engine read by themselves; they are no settings."""

_METAVARS = {int: "N", float: "X", str: "TEXT", dict: "NAME=VALUE"}
_SHORT = {"pipeline_parallel_size": ("-pp",)}


class UnknownSettingError(ConfigError):
    """Nobody knows a setting of that name; the message says which one is near."""

    def __init__(self, spelled: str, where: str, known: Iterable[str]) -> None:
        super().__init__(spelled, None, "known settings")
        hint = nearest(spelled, known)
        self.args = (f"unknown {where} {spelled}" + (f"; {hint}" if hint else ""),)


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
            parser.add_argument(setting.flag, nargs="+", action="extend", **options)
        elif setting.kind is dict:
            parser.add_argument(setting.flag, action="append", type=_spelled(setting.parse_pair), **options)
        else:
            flags = [setting.flag, *_SHORT.get(setting.name, ())]
            parser.add_argument(*flags, type=_spelled(setting.parse), choices=setting.choices, **options)


def _help(setting: Setting) -> str:
    text = setting.help.replace("%", "%%")
    if setting.default in (None, ()):
        return text
    shown = str(setting.default).lower() if setting.kind is bool else setting.default
    return f"{text} (default: {shown})"


def _spelled(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which wants errors of its own."""

    def parse_flag(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(f"{error.value!r}; allowed: {error.allowed}") from error

    return parse_flag


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
            result[name] = tuple(value) if setting.many else dict(value) if setting.kind is dict else value
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
