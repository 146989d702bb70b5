"""``llm-engine schedulers``: what ``--scheduler``, its parts, ``--resource`` and ``--kv-cache-manager`` may name."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Iterator
from typing import Any

from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.setting import Setting
from ..kvcache.registry import KV_CACHE_MANAGERS, RESOURCES
from ..schedulers import registry
from ..schedulers.options import Chosen

Entry = dict[str, Any]
KINDS: dict[str, Registry[Any]] = {
    "scheduler": registry.SCHEDULERS,
    **{kind: names for kind, (names, _) in registry.PART_REGISTRIES.items()},
    "resource": RESOURCES,
    "kv_cache_manager": KV_CACHE_MANAGERS,
}


def run(args: argparse.Namespace) -> int:
    """Print each registered name with a line about it and its options, or all there is to say of one."""
    found = [_entry(kind, args.name) for kind in _kinds_of(args.name)] if args.name else list(_everything())
    if args.json:
        print(json.dumps(found, indent=1, default=str))
        return 0
    for kind in KINDS:
        entries = [entry for entry in found if entry["kind"] == kind]
        if entries:
            print(f"--{kind.replace('_', '-')} NAME")
            _print(entries)
    if args.name:
        _print_details(found)
    else:
        print("Each also takes package.module:Class. More about one: llm-engine schedulers NAME")
    return 0


def _everything() -> Iterator[Entry]:
    for kind, names in KINDS.items():
        for name in names.names():
            yield _entry(kind, name)


def _kinds_of(name: str) -> list[str]:
    """As what this name is registered, or can be loaded; raises ``ConfigError`` listing what there is."""
    if kinds := [kind for kind, names in KINDS.items() if name in names.names()]:
        return kinds
    if ":" not in name:
        known = dict.fromkeys(known for names in KINDS.values() for known in names.names())
        listing: Registry[Any] = Registry("schedulers")
        for each in known:
            listing.add(each, "")
        listing.get(name)
    target = registry.SCHEDULERS.get(name, "schedulers")
    for kind, (_, base) in registry.PART_REGISTRIES.items():
        if inspect.isclass(target) and issubclass(target, base):
            return [kind]
    return ["scheduler"]


def _entry(kind: str, name: str) -> Entry:
    entry: Entry = {"kind": kind, "name": name, "summary": dict(KINDS[kind].describe()).get(name, ""), "options": []}
    try:
        target: Any = (
            registry.PRESETS[name] if kind == "scheduler" and name in registry.PRESETS else KINDS[kind].get(name)
        )
        if isinstance(target, tuple):
            entry["parts"] = dict(zip(registry.PART_REGISTRIES, target, strict=True))
            entry["summary"] = " x ".join(part or "by stages" for part in target) + _default(name)
            return entry
        entry["options"] = [_described(setting) for setting in Chosen(kind, name, target).options.values()]
        entry["doc"] = inspect.getdoc(target) or ""
        if entry["summary"].startswith("from ") and entry["doc"]:
            entry["summary"] = f"{entry['doc'].partition('.')[0]} ({entry['summary']})".replace("\n", " ")
    except ConfigError as error:
        entry["error"] = str(error)
        entry["summary"] = f"cannot be used: {error}"
    return entry


def _described(setting: Setting) -> Entry:
    default = setting.default
    required = default is dataclasses.MISSING
    return {
        "name": setting.name,
        "type": f"{'tuple of ' if setting.many else ''}{setting.kind.__name__}{' or null' if setting.optional else ''}",
        "default": None if required else default,
        "required": required,
        "choices": list(setting.choices) if setting.choices else None,
        "help": setting.help,
    }


def _print(entries: list[Entry]) -> None:
    width = max(len(entry["name"]) for entry in entries)
    for entry in entries:
        print(f"  {entry['name']:<{width}}  {entry['summary']}".rstrip())
        for option in entry["options"]:
            value = "..." if option["required"] else spelled(option["default"])
            choices = f" ({', '.join(option['choices'])})" if option["choices"] else ""
            print(f"    --scheduler-option {option['name']}={value}  {option['help']}{choices}")


def _print_details(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.get("doc"):
            print(f"\n{entry['doc']}")
        parts = entry.get("parts", {})
        for kind, name in parts.items():
            if name is None or any((each["kind"], each["name"]) == (kind, name) for each in entries):
                continue
            print(f"\n--{kind.replace('_', '-')} {name}")
            _print([_entry(kind, name)])


def spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is None else str(value)
    )


def _default(preset: str) -> str:
    one, several = registry.default_preset(1), registry.default_preset(2)
    if preset == one:
        return " (default)" if one == several else " (default with one stage)"
    return " (default with several stages)" if preset == several else ""
