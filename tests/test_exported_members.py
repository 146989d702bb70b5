"""The public face: a sorted list, every name there, and nothing loaded by looking at it."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest

import llm_engine

HEAVY = ("torch", "numpy", "prometheus_client", "transformers", "tokenizers", "asyncio", "flask")


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_list_is_sorted_as_isort_does() -> None:
    """Constants, then classes, then functions; each in order."""
    names = llm_engine.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", llm_engine.__all__)
def test_every_name_can_be_imported_and_knows_its_home(name: str) -> None:
    value = getattr(llm_engine, name)
    assert name in dir(llm_engine)
    if not isinstance(value, str | int):
        assert value.__name__ == name
        assert value.__module__.startswith("llm_engine.")


def test_nothing_else_public_lies_about() -> None:
    public = {
        name
        for name, value in vars(llm_engine).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - {"annotations", "TYPE_CHECKING", "Any"} <= set(llm_engine.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = llm_engine.LLMs
    with pytest.raises(ImportError):
        from llm_engine import LLMs  # noqa: F401


def test_importing_loads_nothing_heavy_starts_nothing_and_is_quick() -> None:
    code = (
        "import os, sys, threading, time\n"
        "environment, began = dict(os.environ), time.perf_counter()\n"
        "import llm_engine\n"
        "took = time.perf_counter() - began\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "import json, logging\n"
        "print(json.dumps([took, loaded, threading.active_count(), dict(os.environ) == environment,\n"
        "                  len(logging.getLogger().handlers)]))\n"
    )
    runs = [json.loads(in_a_fresh_process(code)) for _ in range(3)]
    assert min(run[0] for run in runs) < 0.1
    assert all(run[1:] == [[], 1, True, 0] for run in runs)


def test_the_library_and_its_words_load_no_torch() -> None:
    code = (
        "import sys\n"
        "from llm_engine import *\n"
        "EngineConfig.of(); SamplingParams()\n"
        "print([name for name in ('torch', 'transformers', 'xformers') if name in sys.modules])\n"
    )
    assert in_a_fresh_process(code).strip() == "[]"


def test_schedulers_and_books_load_no_numpy() -> None:
    code = (
        "import sys\n"
        "import llm_engine.schedulers.registry as registry\n"
        "import llm_engine.kvcache.kv_cache_manager, llm_engine.kvcache.resources\n"
        "for each in (registry.ORDERINGS, registry.CAPACITIES, registry.MICRO_BATCHES, registry.SCHEDULERS):\n"
        "    [each.get(name) for name in each.names()]\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])\n"
    )
    assert in_a_fresh_process(code).strip() == "[]"
