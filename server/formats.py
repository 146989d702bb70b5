"""Answers in OpenAI's shapes: what differs between chat and plain completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core.outputs import CompletionOutput, RequestOutput
from ..core.step import TokenLogprobs
from .logprobs import Vocabulary, chat_logprobs, completion_logprobs, prompt_logprobs
from .protocol import ChatRequest, CompletionRequest

Json = dict[str, Any]


class ChatFormat:
    """Choices of ``/v1/chat/completions``. Stateful while streaming; one per request, used by one thread."""

    id_prefix = "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._logprobs = bool(request.logprobs)
        self._introduced: set[int] = set()

    def chunks(self, position: int, part: RequestOutput) -> Iterator[Json]:
        """The choices to stream for one delta: the role first, then text, the reason to end with the last text."""
        for output in part.outputs:
            if output.index not in self._introduced:
                self._introduced.add(output.index)
                yield self._chunk(output.index, {"role": "assistant", "content": ""}, None)
            if output.text or output.finished or (self._logprobs and output.token_ids):
                delta = {"content": output.text} if output.text or not output.finished else {}
                yield self._chunk(output.index, delta, output)

    def _chunk(self, index: int, delta: Json, output: CompletionOutput | None) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if output is not None:
            choice["logprobs"] = self._logprobs_of(output)
            choice["finish_reason"] = output.finish_reason
            if output.finished:
                choice["stop_reason"] = output.stop_reason
        return choice

    def _logprobs_of(self, output: CompletionOutput) -> Json | None:
        if not self._logprobs:
            return None
        return chat_logprobs(self._vocabulary, output.logprobs or [])

    def choices(self, position: int, result: RequestOutput) -> Iterator[Json]:
        """The choices of a finished request."""
        for output in result.outputs:
            yield {
                "index": output.index,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self._logprobs_of(output),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }

    def extras(self, results: list[RequestOutput]) -> Json:
        """More fields of the whole answer."""
        entries = results[0].prompt_logprobs
        return {} if entries is None else {"prompt_logprobs": prompt_logprobs(self._vocabulary, entries)}


class CompletionFormat:
    """Choices of ``/v1/completions``; prompt p's choice i has index p * n + i."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, request: CompletionRequest, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._n = request.n or 1
        self._logprobs = request.logprobs is not None
        self._prompt_logprobs = request.prompt_logprobs is not None
        self._echo = bool(request.echo)
        self._only_prompt = self._echo and request.max_tokens == 0
        self._offsets: dict[int, int] = {}
        """Length of the text so far, by choice; a choice that is in it has been begun."""

    def chunks(self, position: int, part: RequestOutput) -> Iterator[Json]:
        """The choices to stream for one delta."""
        for output in part.outputs:
            index = position * self._n + output.index
            begins = index not in self._offsets
            if output.text or output.finished or begins or (self._logprobs and output.token_ids):
                yield self._choice(index, part, output, echo=self._echo and begins)

    def choices(self, position: int, result: RequestOutput) -> Iterator[Json]:
        """The choices of a finished request."""
        for output in result.outputs:
            choice = self._choice(position * self._n + output.index, result, output, echo=self._echo)
            if self._prompt_logprobs and result.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(self._vocabulary, result.prompt_logprobs)
            yield choice

    def _choice(self, index: int, part: RequestOutput, output: CompletionOutput, *, echo: bool) -> Json:
        prompt = self._prompt_text(part) if echo else ""
        text = prompt if self._only_prompt else prompt + output.text
        start = self._offsets.get(index, 0)
        self._offsets[index] = start + len(text)
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": output.finish_reason}
        if self._logprobs:
            token_ids: list[int] = []
            entries: list[TokenLogprobs | None] = []
            if echo:
                token_ids += part.prompt_token_ids
                entries += part.prompt_logprobs or []
            if not self._only_prompt:
                token_ids += output.token_ids
                entries += output.logprobs or []
            choice["logprobs"] = completion_logprobs(self._vocabulary, token_ids, entries, start)
        if output.finished:
            choice["stop_reason"] = output.stop_reason
        return choice

    def _prompt_text(self, part: RequestOutput) -> str:
        if part.prompt is not None:
            return part.prompt
        return "".join(self._vocabulary.token_text(token_id) for token_id in part.prompt_token_ids)

    def extras(self, results: list[RequestOutput]) -> Json:
        """More fields of the whole answer."""
        return {}


Format = ChatFormat | CompletionFormat
