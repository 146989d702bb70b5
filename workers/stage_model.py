"""What a stage is made of, from names and settings alone: a process can be told these, not objects."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from .model_engine import ModelEngine


def importable_name(field: str, thing: Any) -> str:
    """``module:qualname`` under which another process finds the same object; raises ``ConfigError`` saying why not."""
    module, qualname = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    where = "something a stage's process can import: a function or class of a module"
    if not module or not qualname:
        raise ConfigError(field, thing, f"{where}; an object made at run time has no name to import it by")
    if "<" in qualname:
        raise ConfigError(field, thing, f"{where}; one made inside a function is gone when that returns")
    if module == "__main__":
        raise ConfigError(field, thing, f"{where}; move it out of the main script, which a stage does not run again")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not thing:
        raise ConfigError(field, thing, f"{where}; {module}:{qualname} is another object")
    return f"{module}:{qualname}"


def imported(name: str) -> Any:
    """The object of that ``module:qualname``. Raises what importing it raises."""
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def make_torch_engine(
    config: EngineConfig, path: str, stage: int, *, on_cuda: bool, num_threads: int | None
) -> ModelEngine:
    """Torch's model engine for one stage. Loads torch; to be called in the stage's own thread."""
    from .torch_stage import make_torch_stage

    return make_torch_stage(path, config, stage, on_cuda=on_cuda, num_threads=num_threads)


def memory_name(on_cuda: bool) -> str:
    """Names the memory that a stage's pool lies in, alike in all processes that share it."""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        host = "this host"
    torch = sys.modules.get("torch")
    if not on_cuda or torch is None:
        return host
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{host}/{getattr(properties, 'uuid', torch.cuda.current_device())}"
