"""What requests are like here: how many prompt tokens come with how many of an answer."""

from __future__ import annotations

from ..core.views import RequestView

_MEMORY = 64
"""Requests that a mean is of, about."""


class Traffic:
    """Means over the requests that came and ended of late."""

    def __init__(self) -> None:
        self._alive: dict[int, RequestView] = {}
        self._num_added = self._num_ended = 0
        self._prompt = self._allowed = self._answered = 0.0

    def added(self, request: RequestView) -> None:
        """It arrived. One that comes back counts once."""
        if request.request_id in self._alive:
            return
        self._alive[request.request_id] = request
        self._num_added = min(self._num_added + 1, _MEMORY)
        self._prompt += (request.num_prompt_tokens - self._prompt) / self._num_added
        allowed = request.max_total_tokens - request.num_prompt_tokens
        self._allowed += (allowed - self._allowed) / self._num_added

    def ended(self, request_id: int) -> None:
        """However it ended. Unknown ids are ignored."""
        request = self._alive.pop(request_id, None)
        if request is not None:
            self._num_ended = min(self._num_ended + 1, _MEMORY)
            self._answered += (request.num_output_tokens - self._answered) / self._num_ended

    def due(self, num_decodes: float, prompt_tokens: float) -> float:
        """Prompt tokens a step for ``num_decodes`` to be followed by as many when they end, and for ``prompt_tokens``
        more to be computed meanwhile."""
        return (num_decodes * self._prompt + prompt_tokens) / self.answer

    @property
    def answer(self) -> float:
        """Tokens, as many as those had that ended; until one has, as many as they may get."""
        return max(1.0, self._answered if self._num_ended else self._allowed)
