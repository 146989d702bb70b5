"""Short prompts first, and nobody waits for ever: an ordering for llm-engine."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from llm_engine import ConfigError, Ordering, RequestView, SchedulingPass, option

PRESET = ("shortest-prompt", "max-utilization", None)  # no micro-batch: greedy or balanced, by the number of stages


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortestPromptOptions:
    tokens_per_second: float = option(200.0, "prompt tokens that weigh as much as having come a second later")

    def __post_init__(self) -> None:
        if not self.tokens_per_second > 0:
            raise ConfigError("tokens_per_second", self.tokens_per_second, "above 0")


class ShortestPrompt(Ordering):
    """A request stands where it would if its prompt had taken that long to type: its place never changes."""

    Options = ShortestPromptOptions
    interface_version = 1

    def __init__(self, options: ShortestPromptOptions | None = None) -> None:
        self._rate = (options or ShortestPromptOptions()).tokens_per_second
        self._line: list[tuple[float, int]] = []  # (place, request id), sorted
        self._waiting: dict[int, RequestView] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: RequestView) -> None:
        self._waiting[request.request_id] = request
        insort(self._line, self._place(request))

    def remove(self, request_id: int) -> None:
        if request := self._waiting.pop(request_id, None):
            del self._line[bisect_left(self._line, self._place(request))]

    def visit(self, step: SchedulingPass) -> Iterator[RequestView]:
        return (self._waiting[request_id] for _, request_id in self._line)

    def _place(self, request: RequestView) -> tuple[float, int]:
        return request.arrival + request.num_prompt_tokens / self._rate, request.request_id
