"""The shortest expected answer first, so that few wait long for many; who waits rises slowly.

Shortest remaining time first (Schrage 1968) over the tokens an answer is still to have, which for language models is
known only as a limit or a guess (Fu et al. 2024, "Efficient LLM Scheduling by Learning to Rank"). It does not displace
residents: what an answer has left to run is no reason to compute another's prompt twice.

    place(now) = remaining tokens - aging * (now - arrival)

All rise at the same rate, so ``remaining + aging * arrival`` is sorted once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

from ...core.config import check_types, option
from ...core.errors import ConfigError
from ...core.registry import Registry
from ...core.views import RequestView
from .by_key import KeyedOrdering

Predictor = Callable[[RequestView], float]


def max_tokens(request: RequestView) -> int:
    """As long as it may become: ``max_tokens``, or what context and cache leave to a request without."""
    return request.max_total_tokens - request.num_prompt_tokens


PREDICTORS: Registry[float] = Registry("predictor")
PREDICTORS.add("max-tokens", ".schedulers.orderings.shortest_job:max_tokens", "as long as the answer may become")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortestJobOptions:
    """Who says how long an answer will be, and how fast who waits gains on the shorter ones."""

    predictor: str = option(
        "max-tokens", "max-tokens, or package.module:function that takes a request and returns the tokens of its answer"
    )
    aging: float = option(10.0, "tokens that a second since its arrival makes a request count as shorter; 0: none")

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.aging < float("inf"):
            raise ConfigError("aging", self.aging, "0 or a number above")


class ShortestJobOrdering(KeyedOrdering):
    """Asks the predictor once for each request; remembers its answer until the request ends."""

    Options = ShortestJobOptions

    def __init__(self, options: ShortestJobOptions | None = None) -> None:
        super().__init__()
        options = options or ShortestJobOptions()
        self._name, self._aging = options.predictor, options.aging
        self._predict: Predictor = PREDICTORS.get(options.predictor, "predictor")
        if not callable(self._predict):
            raise ConfigError("predictor", options.predictor, "something that can be called with a request")
        self._predicted: dict[int, float] = {}

    def key(self, request: RequestView) -> float:
        # One that outlived its prediction is about to end, for all we know.
        remaining = max(self._prediction(request) - request.num_output_tokens, 1)
        return remaining + self._aging * request.arrival

    def ended(self, request_id: int) -> None:
        self._predicted.pop(request_id, None)

    def _prediction(self, request: RequestView) -> float:
        known = self._predicted.get(request.request_id)
        if known is not None:
            return known
        tokens = self._predict(request)
        if isinstance(tokens, bool) or not isinstance(tokens, numbers.Real) or not 0 <= tokens < math.inf:
            raise ValueError(f"predictor {self._name} returned {tokens!r}, not a number of tokens")
        self._predicted[request.request_id] = tokens
        return tokens
