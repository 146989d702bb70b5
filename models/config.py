"""A checkpoint's ``config.json``, read as it lies on disk: both spellings of position encodings, old and new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ModelLoadError
from .spec import RopeSpec

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class CheckpointConfig(dict[str, Any]):
    """The keys of ``config.json``; asking with ``[]`` for one that is missing raises ``ModelLoadError`` naming it."""

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        super().__init__(values)
        self.source = source

    def __missing__(self, key: str) -> Any:
        raise ModelLoadError(f"{self.source} has no {key!r}")

    def either(self, key: str, default: Any) -> Any:
        """The key's value; the default where it is missing or null."""
        value = self.get(key)
        return default if value is None else value

    @property
    def architecture(self) -> str:
        """The first of ``architectures``."""
        names = self.get("architectures")
        if not names or not isinstance(names, list):
            raise ModelLoadError(f"{self.source} names no architecture: 'architectures' is {names!r}")
        return str(names[0])

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim") or self["hidden_size"] // self["num_attention_heads"])

    @property
    def dtype(self) -> str | None:
        """The type the checkpoint asks for, if it names one."""
        name = self.get("dtype") or self.get("torch_dtype")
        return None if name is None else str(name).removeprefix("torch.")


def read_config(folder: Path) -> CheckpointConfig:
    """Read ``config.json``; raises ``ModelLoadError`` where it is missing, broken or asks for what is not served."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{folder} is no checkpoint: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} holds a {type(values).__name__}, not an object")
    config = CheckpointConfig(values, str(path))
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ModelLoadError(f"{path}: quantization_config asks for {method!r}; quantized checkpoints are not served")
    return config


def rope_spec(
    config: CheckpointConfig,
    *,
    default_theta: float = 10000.0,
    layer_type: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> RopeSpec:
    """The position encoding of a config: new ``rope_parameters`` (flat or one per layer type) or old ``rope_scaling``.

    ``aliases`` maps an old name of a kind to its present one. Raises ``ModelLoadError`` for an unknown kind or a
    missing parameter.
    """
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layer_type is not None and isinstance(values.get(layer_type), dict):
        values = values[layer_type]
    elif any(isinstance(value, dict) for value in values.values()):
        raise ModelLoadError(f"{config.source}: rope_parameters by layer type are not supported for this architecture")
    kind = values.get("rope_type") or values.get("type") or "default"
    kind = (aliases or {}).get(kind, kind)
    if kind not in ROPE_KINDS:
        raise ModelLoadError(f"{config.source}: rope type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    for name in _REQUIRED.get(kind, ()):
        if values.get(name) is None:
            raise ModelLoadError(f"{config.source}: rope type {kind!r} needs {name!r}")
    max_positions = int(config["max_position_embeddings"])
    # A value beside the position encoding's own block comes first, as Phi-3's checkpoints expect.
    original = config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    partial = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    spec = RopeSpec(
        kind=kind,
        dim=int(config.head_dim * partial),
        theta=float(values.get("rope_theta") or config.get("rope_theta") or default_theta),
        max_positions=max_positions,
        original_max_positions=int(original or max_positions),
        parameters=values,
    )
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(values[name]) != spec.dim // 2:
                raise ModelLoadError(f"{config.source}: {name} has {len(values[name])} entries, not {spec.dim // 2}")
    return spec


def stretched_length(rope: RopeSpec) -> int:
    """Longest context an encoding allows: some kinds stretch ``max_position_embeddings`` by their factor."""
    if rope.kind in ("linear", "dynamic"):
        return int(rope.max_positions * float(rope.parameters["factor"]))
    if rope.kind == "yarn":
        return max(rope.max_positions, int(rope.original_max_positions * float(rope.parameters["factor"])))
    return rope.max_positions
