"""What a stage is made of, from names and settings alone: a process can be told these, not objects."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, ModelLoadError
from .control import Launch, Setup
from .fingerprint import fingerprint
from .model_engine import ModelEngine


def importable_name(field: str, thing: Any) -> str:
    """``module:qualname`` under which another process finds the same object; raises ``ConfigError`` saying why not."""
    module, qualname = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    where = "something a stage's process can import: a function or class of a module"
    if not module or not qualname:
        raise ConfigError(field, thing, f"{where}; an object made at run time has no name to import it by")
    if "<" in qualname:
        raise ConfigError(field, thing, f"{where}; a lambda, or what a function makes, has no name to import it by")
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


def make_model_engine(setup: Setup, launch: Launch) -> ModelEngine:
    """The model engine that the settings ask for. Raises ``ModelLoadError`` where the engine has another checkpoint."""
    if setup.model_engine is not None:
        engine: ModelEngine = imported(setup.model_engine)(setup.index)
        return engine
    path = checkpoint_folder(setup, launch)
    found = fingerprint(path)
    if setup.fingerprint is not None and found != setup.fingerprint:
        raise ModelLoadError(
            f"the checkpoint in {path} has the fingerprint {found}, the engine's {setup.fingerprint}: they differ"
        )
    from .torch_stage import make_torch_stage

    num_threads = launch.num_threads or (setup.config.parallel.cpu_threads if launch.remote else None)
    return make_torch_stage(path, setup.config, setup.index, on_cuda=setup.on_cuda, num_threads=num_threads)


def checkpoint_folder(setup: Setup, launch: Launch) -> str:
    """Where the checkpoint lies on this host. Raises ``ModelLoadError``."""
    if launch.model is not None:
        if not os.path.isfile(os.path.join(launch.model, "config.json")):
            raise ModelLoadError(f"{launch.model} is no checkpoint: it has no config.json")
        return launch.model
    if setup.model_path is not None and os.path.isdir(setup.model_path):
        return setup.model_path
    from ..models.hub import resolve_model

    model = setup.config.model
    return str(resolve_model(model.model, revision=model.revision, download_dir=model.download_dir))


def memory_name(on_cuda: bool) -> str:
    """Names the memory that a stage's pool lies in, alike in all processes that share it."""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        host = "this host"
    torch = sys.modules.get("torch")
    if not on_cuda or torch is None:
        return host
    device = torch.cuda.current_device()
    return f"{host}/{getattr(torch.cuda.get_device_properties(device), 'uuid', device)}"
