"""Options of a scheduler's parts: whose each is, and what it may be.

A part says what it takes in its ``Options``, a dataclass; ``--scheduler-option NAME=VALUE`` sets its fields. A name
goes to the one chosen part that has it, or is qualified by the part: ``ordering.aging_s=5``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError
from ..core.setting import Setting, settings_of

FIELD = "scheduler_options"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A part, or a whole scheduler, that the settings name."""

    kind: str
    """``ordering``, ``capacity``, ``micro_batch`` or ``scheduler``; qualifies its options."""
    name: str
    factory: Any

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def options(self) -> dict[str, Setting]:
        """What it may be told, by name. Raises ``ConfigError`` where its ``Options`` cannot be read."""
        declared = getattr(self.factory, "Options", None)
        if declared is None:
            return {}
        if not (isinstance(declared, type) and dataclasses.is_dataclass(declared)):
            raise ConfigError(self.kind, self.name, f"a part whose Options is a dataclass; it is {declared!r}")
        try:
            return settings_of(declared)
        except Exception as error:
            raise ConfigError(self.kind, self.name, f"a part whose Options can be read: {error}") from error


OtherOwners = Callable[[str], str | None]
"""Which registered part has an option of that name, in words."""


def sort_options(
    given: Mapping[str, Any], parts: list[Chosen], other_owners: OtherOwners = lambda name: None
) -> dict[str, dict[str, Any]]:
    """The given options by the kind of their parts. Raises ``ConfigError`` for one that belongs to none or several."""
    known = {part.kind: part.options for part in parts}
    chosen = {part.kind: part for part in parts}
    result: dict[str, dict[str, Any]] = {kind: {} for kind in known}
    for spelled, value in given.items():
        kind, dot, name = spelled.replace("-", "_").rpartition(".")
        if dot and kind not in known:
            raise ConfigError(FIELD, spelled, f"qualified by {' or '.join(known)}")
        owners = [owner for owner in ([kind] if dot else known) if name in known[owner]]
        if len(owners) > 1:
            raise ConfigError(FIELD, spelled, f"{' or '.join(f'{owner}.{name}' for owner in owners)}: several have it")
        if not owners:
            if right := [owner for owner in known if name in known[owner]]:
                raise ConfigError(FIELD, spelled, f"{right[0]}.{name}: it is an option of {chosen[right[0]].title}")
            raise ConfigError(FIELD, spelled, _whose(name, [chosen[kind]] if dot else parts, known, other_owners(name)))
        if name in result[owners[0]]:
            raise ConfigError(FIELD, spelled, f"{name} once; it is given twice")
        result[owners[0]][name] = value
    return result


def _whose(name: str, parts: list[Chosen], known: Mapping[str, Mapping[str, Setting]], elsewhere: str | None) -> str:
    """Why nobody takes an option of that name."""
    own = [option for part in parts for option in known[part.kind]]
    if elsewhere is not None:
        return f"an option of {' or '.join(part.title for part in parts)}; {elsewhere} has this one, and is not chosen"
    if not own:
        return f"none: {', '.join(part.title for part in parts)} take no options"
    listed = "; ".join(f"{', '.join(known[part.kind])} of {part.title}" for part in parts if known[part.kind])
    close = difflib.get_close_matches(name, own, n=1)
    return listed + (f" (did you mean {close[0]!r}?)" if close else "")


def make_options(part: Chosen, given: Mapping[str, Any]) -> Any:
    """The part's ``Options`` with these values, texts read as their fields' types; ``None`` where it has none.

    Raises ``ConfigError`` for a value of a wrong type, outside its choices, or missing.
    """
    settings = part.options
    if (declared := getattr(part.factory, "Options", None)) is None:
        return None
    values = {name: _read(settings[name], value) for name, value in given.items()}
    for name, setting in settings.items():
        if setting.default is dataclasses.MISSING and name not in values:
            raise ConfigError(FIELD, None, f"{name}=..., which {part.title} must be told")
    try:
        return declared(**values)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            FIELD, dict(given), f"what the Options of {part.title} take; they raised {error!r}"
        ) from error


def _read(setting: Setting, value: Any) -> Any:
    read = setting.parse(value) if isinstance(value, str) else setting.check(value)
    if isinstance(read, float) and math.isnan(read):
        raise ConfigError(setting.name, value, "a number")
    if setting.choices is not None and read not in setting.choices:
        raise ConfigError(setting.name, value, ", ".join(setting.choices))
    return read
