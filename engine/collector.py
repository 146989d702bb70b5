"""From deltas to ``RequestOutput``: one request's choices, in the thread of whoever waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..core.errors import EngineDeadError
from ..core.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from ..core.request import Request, RequestEvent
from ..core.step import TokenLogprobs
from .delta import Delta
from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

Abort = Callable[[list[int], FinishReason], None]


class RequestCollector:
    """Collects the choices of one caller's request. One thread at a time.

    ``streaming`` makes ``take`` return what is new; otherwise text is made at the end, unless stop strings need it
    before.
    ``abort`` is called when a stop string ends a choice that the engine still runs.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        prompt: str | None,
        tokenizer: Tokenizer | None,
        abort: Abort,
        *,
        streaming: bool,
    ) -> None:
        self.requests = list(requests)
        self.prompt = prompt
        self.error: Exception | None = None
        """The first error of any choice."""
        self._abort = abort
        self._prompt_token_ids = list(requests[0].prompt_token_ids)  # one copy for all parts of a stream
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]
        self._last_token: float | None = None
        params = requests[0].params
        self._choices = {request.request_id: _Choice(request, tokenizer, streaming) for request in requests}
        self._num_unfinished = len(self._choices)
        self._wants_prompt_logprobs = params.prompt_logprobs is not None

    @property
    def request_ids(self) -> list[int]:
        return [request.request_id for request in self.requests]

    @property
    def unfinished_ids(self) -> list[int]:
        return [request_id for request_id, choice in self._choices.items() if not choice.output.finished]

    @property
    def finished(self) -> bool:
        return not self._num_unfinished

    def take(self, delta: Delta) -> RequestOutput | None:
        """Add one delta. With ``streaming``: what is new, or ``None`` when nothing is certain yet."""
        choice = self._choices[delta.request.request_id]
        if choice.output.finished:
            return None  # a stop string ended it here before the engine knew
        if delta.prompt_logprobs and delta.request is self.requests[0]:
            start = delta.prompt_start
            self._prompt_logprobs[start : start + len(delta.prompt_logprobs)] = delta.prompt_logprobs
        if delta.token_ids:
            self._last_token = delta.at
        if delta.error is not None and self.error is None:
            self.error = delta.error
        try:
            part = choice.take(delta)
        finally:
            self._num_unfinished -= choice.output.finished
        if choice.output.finished and delta.finish_reason is None:  # a stop string, which only the text shows
            self._abort([delta.request.request_id], FinishReason.STOP)
        return self._output([part]) if part is not None else None

    def cancel(self) -> None:
        """End what the engine still runs; any thread."""
        if ids := self.unfinished_ids:
            self._abort(ids, FinishReason.ABORT)

    def result(self) -> RequestOutput:
        """All of it; the choices in order."""
        return self._output([choice.output for choice in self._choices.values()])

    def raise_if_dead(self) -> None:
        """Raise the ``EngineDeadError`` that ended it, if one did."""
        if isinstance(self.error, EngineDeadError):
            raise self.error

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        first = self.requests[0]
        return RequestOutput(
            request_id=first.external_id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=outputs,
            metrics=RequestMetrics(
                arrival=first.arrival,
                first_scheduled=first.time_of(RequestEvent.SCHEDULED),
                first_token=_earliest(r.time_of(RequestEvent.FIRST_TOKEN) for r in self.requests),
                last_token=self._last_token,
                num_preemptions=sum(r.num_preemptions for r in self.requests),
            ),
            num_cached_tokens=first.num_cached_tokens or 0,
            prompt_logprobs=self._prompt_logprobs if self._wants_prompt_logprobs else None,
        )


class _Choice:
    def __init__(self, request: Request, tokenizer: Tokenizer | None, streaming: bool) -> None:
        params = request.params
        self.output = CompletionOutput(request.choice_index)
        self._streaming = streaming
        self._tokenizer = tokenizer if params.detokenize else None
        self._skip_special = params.skip_special_tokens
        self._detokenizer: Detokenizer | None = None
        if self._tokenizer is not None and (streaming or params.stop):
            self._detokenizer = Detokenizer(
                self._tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )
        # A stop token is told, but its text is not part of the answer (an end-of-sequence token has none to show).
        self._hide_stop_token = not params.include_stop_str_in_output
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def take(self, delta: Delta) -> CompletionOutput | None:
        """With ``streaming``: what is new, or ``None`` when nothing is certain yet."""
        output, new_ids = self.output, delta.token_ids
        ends_on_stop = delta.finish_reason is FinishReason.STOP and bool(new_ids) and self._hide_stop_token
        visible = new_ids[:-1] if ends_on_stop else new_ids
        if self._detokenizer is not None:
            used = self._detokenizer.add(visible)
            if self._detokenizer.stop_found is not None:
                new_ids = new_ids[:used]
        output.token_ids.extend(new_ids)
        new_logprobs = None
        if output.logprobs is not None and delta.logprobs:
            new_logprobs = delta.logprobs[: len(new_ids)]
            output.logprobs.extend(new_logprobs)
            added = sum(entry.logprob for entry in new_logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + added
        if self._detokenizer is not None or delta.finish_reason is not None:
            self._end(delta, ends_on_stop)
        if not self._streaming:
            return None
        text = self._detokenizer.release() if self._detokenizer is not None else ""
        if not new_ids and not text and not output.finished:
            return None
        return CompletionOutput(
            output.index,
            text,
            list(new_ids),
            new_logprobs,
            output.cumulative_logprob,
            output.finish_reason,
            output.stop_reason,
            output.error,
        )

    def _end(self, delta: Delta, ends_on_stop: bool) -> None:
        output, detokenizer = self.output, self._detokenizer
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            output.error = str(delta.error) if delta.error is not None else None
            if detokenizer is not None and detokenizer.stop_found is None:
                detokenizer.finish()
        if detokenizer is not None and detokenizer.stop_found is not None:
            output.finish_reason, output.stop_reason = FinishReason.STOP, detokenizer.stop_found
        if detokenizer is not None:
            output.text = detokenizer.text
        elif output.finished and self._tokenizer is not None:
            shown = output.token_ids[:-1] if ends_on_stop else output.token_ids
            output.text = self._tokenizer.decode(shown, skip_special_tokens=self._skip_special)


def _earliest(times: Iterable[float | None]) -> float | None:
    return min((at for at in times if at is not None), default=None)
