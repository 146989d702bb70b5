"""Every error this engine raises on purpose.

EngineError
├── RequestError                 one request is at fault or is affected; the engine is fine
│   ├── InvalidParamsError       a field of the request has a value that is not allowed
│   │   └── PromptTooLongError   the prompt (or prompt + max_tokens) exceeds the context
│   ├── ModelNotFoundError       the request names a model this engine does not serve
│   ├── RequestFailedError       a step that carried the request failed
│   └── RequestShedError         the scheduler gave the request up before it ran
├── CapacityError                the request can never get the memory or resource it needs
│   └── QueueFullError           too many requests wait already; try again later
├── SchedulerError               a scheduler returned an impossible plan or raised
├── KVCacheError                 a KV cache manager broke its rule or raised
├── ModelLoadError               the checkpoint cannot be served: unknown architecture, bad weight, ...
├── EngineDeadError              the engine cannot go on; carries the cause
└── ConfigError                  a setting has a value that is not allowed
"""

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """The root of all errors raised by llm-engine."""


class RequestError(EngineError):
    """One request is at fault or is affected; the engine and other requests are untouched."""


class InvalidParamsError(RequestError, ValueError):
    """A field of the request has a value that is not allowed.

    ``field`` names it as the user spelled it, ``value`` is what was given, ``allowed`` says what would do.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        try:
            shown = repr(value)
        except ValueError:  # a whole number of thousands of digits
            shown = f"a {type(value).__name__} that cannot be shown"
        super().__init__(f"{field} is {shown if len(shown) <= 80 else shown[:77] + '...'}; allowed: {allowed}")


class PromptTooLongError(InvalidParamsError):
    """The prompt, or the prompt and max_tokens together, exceed the context length."""


class ModelNotFoundError(RequestError):
    """The request names a model this engine does not serve."""


class RequestFailedError(RequestError):
    """A step that carried the request failed; the message names the cause."""


class RequestShedError(RequestError):
    """The scheduler gave the request up while it waited; the message says why."""


class CapacityError(EngineError):
    """The request can never get the memory or the resource it needs; the message says what would help."""


class QueueFullError(CapacityError):
    """Too many requests wait already; try again later."""


class SchedulerError(EngineError):
    """A scheduler raised, or returned a plan that breaks the rules; the message names scheduler and rule."""


class KVCacheError(EngineError):
    """A KV cache manager's ``retention`` raised, or answered what is none; the message names the manager."""


class ModelLoadError(EngineError):
    """The checkpoint cannot be served; the message names the architecture, weight or setting at fault."""


class EngineDeadError(EngineError):
    """The engine cannot go on. ``__cause__`` is the first thing that went wrong, where it is known."""


class ConfigError(EngineError, ValueError):
    """A setting has a value that is not allowed."""

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} is {value!r}; allowed: {allowed}")
