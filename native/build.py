"""Compiles ``csrc`` at first use and loads it; one shared object per compiler, source and CPU, kept in a user's cache.

torch must have been imported before: the object needs an OpenMP runtime, and then shares torch's instead of bringing
a second one whose threads would fight for the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math: gcc would link code that flushes denormals to zero in the whole process.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-ffp-contract=fast", "-Wno-psabi")
COMPILE_TIMEOUT_S = 300.0

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []


def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None where ``LLM_ENGINE_NATIVE=0`` or they cannot be had (logged once).

    Any thread may call it; the answer never changes in a process.
    """
    with _lock:
        if not _loaded:
            assert "torch" in sys.modules, "import torch first: its OpenMP runtime is shared"
            _loaded.append(None if os.environ.get("LLM_ENGINE_NATIVE") == "0" else _load())
        return _loaded[0]


def _load() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        reason = "no C++ compiler was found"
    else:
        try:
            return ctypes.CDLL(str(compiled(compiler, cache_folder())))
        except (OSError, subprocess.SubprocessError) as error:
            # The compiler's own words, where there are any, end with the error that matters.
            said = (getattr(error, "stderr", None) or "").strip()
            reason = f"compiling the kernels failed: {said[-400:] or error}"
    logger.warning(
        "Running without native CPU kernels, which costs speed but not correctness: %s. Installing g++ (for example "
        "'apt install g++') brings them; LLM_ENGINE_NATIVE=0 silences this.",
        reason,
    )
    return None


def find_compiler() -> str | None:
    """``$CXX``, or the first of g++, c++, clang++ on the path."""
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``llm-engine/native``."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "llm-engine" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="llm-engine-native-"))


def compiled(compiler: str, folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared object in ``folder``, made there unless it is.

    Written aside and renamed, so that processes which start together all find a whole one. Raises ``OSError`` or
    ``subprocess.SubprocessError``.
    """
    target = folder / f"kernels-{_key(compiler, flags)}.so"
    if target.exists():
        return target
    handle, draft = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *flags, *(str(path) for path in sorted(SOURCES.glob("*.cpp"))), "-o", draft]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise
    return target


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with whatever changes the object: compiler, flags, sources, and the CPU that ``native`` stands for."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
    for part in (compiler.encode(), version.stdout, " ".join(flags).encode(), _cpu().encode()):
        digest.update(part + b"\0")
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """The CPU's model and instruction sets, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
