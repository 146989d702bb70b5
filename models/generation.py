"""What a checkpoint says of generating: the ids that end a text, and its authors' sampling settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ModelLoadError
from .config import CheckpointConfig

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Read from ``generation_config.json``, where there is one, and ``config.json``."""

    eos_token_ids: list[int] = field(default_factory=list)
    """Ascending; of both files, since instruct models often add theirs to one alone."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Some of temperature, top_p, top_k, min_p, repetition_penalty; temperature 0 where sampling is switched off."""


def read_generation_defaults(folder: Path, config: CheckpointConfig) -> GenerationDefaults:
    """Raises ``ModelLoadError`` for a file that is there but broken."""
    path = folder / "generation_config.json"
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            eos = _ids(values.get("eos_token_id")) | _ids(config.get("eos_token_id"))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error}") from error
    else:
        eos = _ids(config.get("eos_token_id"))
    sampling = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    if values.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    return GenerationDefaults(sorted(eos), sampling)


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(item) for item in value} if isinstance(value, list) else {int(value)}
