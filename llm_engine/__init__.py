"""llm-engine: LLM inference on plain threads, with schedulers you can swap by name.

    from llm_engine import LLM, SamplingParams

    with LLM() as llm:
        print(llm.generate("Once upon a time")[0].outputs[0].text)

Importing this package loads no torch, starts nothing and configures nothing; names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.version import __version__

if TYPE_CHECKING:
    from .core.config import EngineConfig, option
    from .core.errors import (
        CapacityError,
        ConfigError,
        EngineDeadError,
        EngineError,
        InvalidParamsError,
        KVCacheError,
        ModelLoadError,
        ModelNotFoundError,
        PromptTooLongError,
        QueueFullError,
        RequestError,
        RequestFailedError,
        RequestShedError,
        SchedulerError,
    )
    from .core.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
    from .core.request import Request, RequestId
    from .core.request_table import RequestTable
    from .core.sampling_params import SamplingParams
    from .core.step import StepPlan, TokenLogprobs
    from .core.trace import StepStats
    from .core.views import QueueView, RequestView, TableView
    from .engine.executors.base import Executor
    from .engine.llm import LLM
    from .engine.stream import RequestStream
    from .kvcache.kv_cache_manager import KVCacheManager
    from .kvcache.resources import BaseResourceManager, ResourceManager
    from .kvcache.view import KVView
    from .schedulers.base import INTERFACE_VERSION, Capacity, MicroBatch, Ordering, Scheduler, Verdict
    from .schedulers.limits import Limits
    from .schedulers.scheduling_pass import SchedulingPass
    from .workers.model_engine import ModelEngine, ModelInfo

_HOMES = {
    "core.config": ("EngineConfig", "option"),
    "core.errors": (
        "CapacityError",
        "ConfigError",
        "EngineDeadError",
        "EngineError",
        "InvalidParamsError",
        "KVCacheError",
        "ModelLoadError",
        "ModelNotFoundError",
        "PromptTooLongError",
        "QueueFullError",
        "RequestError",
        "RequestFailedError",
        "RequestShedError",
        "SchedulerError",
    ),
    "core.outputs": ("CompletionOutput", "FinishReason", "RequestMetrics", "RequestOutput"),
    "core.request": ("Request", "RequestId"),
    "core.request_table": ("RequestTable",),
    "core.sampling_params": ("SamplingParams",),
    "core.step": ("StepPlan", "TokenLogprobs"),
    "core.trace": ("StepStats",),
    "core.views": ("QueueView", "RequestView", "TableView"),
    "engine.executors.base": ("Executor",),
    "engine.llm": ("LLM",),
    "engine.stream": ("RequestStream",),
    "kvcache.kv_cache_manager": ("KVCacheManager",),
    "kvcache.resources": ("BaseResourceManager", "ResourceManager"),
    "kvcache.view": ("KVView",),
    "schedulers.base": ("INTERFACE_VERSION", "Capacity", "MicroBatch", "Ordering", "Scheduler", "Verdict"),
    "schedulers.limits": ("Limits",),
    "schedulers.scheduling_pass": ("SchedulingPass",),
    "workers.model_engine": ("ModelEngine", "ModelInfo"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "INTERFACE_VERSION",
    "LLM",
    "BaseResourceManager",
    "Capacity",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "Executor",
    "FinishReason",
    "InvalidParamsError",
    "KVCacheError",
    "KVCacheManager",
    "KVView",
    "Limits",
    "MicroBatch",
    "ModelEngine",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "Ordering",
    "PromptTooLongError",
    "QueueFullError",
    "QueueView",
    "Request",
    "RequestError",
    "RequestFailedError",
    "RequestId",
    "RequestMetrics",
    "RequestOutput",
    "RequestShedError",
    "RequestStream",
    "RequestTable",
    "RequestView",
    "ResourceManager",
    "SamplingParams",
    "Scheduler",
    "SchedulerError",
    "SchedulingPass",
    "StepPlan",
    "StepStats",
    "TableView",
    "TokenLogprobs",
    "Verdict",
    "__version__",
    "option",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
