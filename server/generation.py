"""Runs one generation request: submits its prompts, watches its client, answers whole or as server-sent events."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Response

from ..core.errors import EngineError
from ..core.outputs import RequestOutput
from ..core.sampling_params import SamplingParams
from .disconnects import DisconnectWatcher
from .fan_in import fan_in
from .formats import Format
from .http_errors import ApiError, api_error
from .protocol import GenerationRequest

if TYPE_CHECKING:
    from ..engine.llm import LLM

log = logging.getLogger("llm_engine.server")

_DONE = b"data: [DONE]\n\n"
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Part = tuple[int, RequestOutput]


class Generations:
    """Answers generation requests, a calling thread each, at most ``slots`` at a time."""

    def __init__(self, llm: LLM, watcher: DisconnectWatcher, slots: int) -> None:
        self._llm, self._watcher = llm, watcher
        self._slots = threading.BoundedSemaphore(slots)

    def answer(
        self,
        sock: Any,
        request: GenerationRequest,
        prompts: list[str | list[int]],
        params: SamplingParams,
        shape: Format,
        model: str,
        spelled: dict[str, str],
        tenant: str | None,
    ) -> Response:
        """Run the prompts and answer as asked. Raises ``ApiError``; the engine's errors become one.

        ``spelled``: the engine's names of fields that this request spells otherwise.

        A streamed answer begins with its first token: what goes wrong before has its own HTTP status.
        """
        with contextlib.ExitStack() as running:
            if not self._slots.acquire(blocking=False):
                raise ApiError(429, "too many requests are being answered; try again later")
            running.callback(self._slots.release)
            envelope = _Envelope(shape, request, model)
            try:
                streams = []
                for position, prompt in enumerate(prompts):
                    stream = self._llm.stream(
                        prompt,
                        params,
                        request_id=envelope.id if len(prompts) == 1 else f"{envelope.id}-{position}",
                        priority=request.priority or 0,
                        deadline_ms=request.deadline_ms,
                        tenant=tenant,
                        cache_salt=request.cache_salt,
                    )
                    running.callback(stream.cancel)
                    streams.append(stream)

                def client_gone() -> None:
                    log.debug("client of %s has gone", envelope.id)
                    for stream in streams:
                        stream.cancel()

                running.enter_context(self._watcher.watch(sock, client_gone))
                parts = fan_in(streams)
                if not request.stream:
                    for _ in parts:
                        pass
                    return _json(envelope.whole([stream.result() for stream in streams]))
                first = list(itertools.islice(parts, 1))
            except EngineError as error:
                raise api_error(error, {"tenant": "user", **spelled}) from error
            events = _events(envelope, itertools.chain(first, parts))
            response = Response(events, mimetype="text/event-stream", headers=_SSE_HEADERS)
            # The server closes the response whether or not it got to read it, which a generator would not notice.
            response.call_on_close(running.pop_all().close)
            return response


def _events(envelope: _Envelope, parts: Iterator[Part]) -> Iterator[bytes]:
    """The body of a streamed answer, one piece per delta."""
    try:
        for position, part in parts:
            if frames := envelope.frames(position, part):
                yield frames
        if envelope.request.wants_usage:
            yield envelope.usage_frame()
    except Exception as error:
        if not isinstance(error, EngineError):
            log.exception("streaming %s", envelope.id)
        else:
            log.warning("request %s ended: %s", envelope.id, error)
        yield _frame(api_error(error).body())
    yield _DONE


class _Envelope:
    """What goes around the choices of one answer."""

    def __init__(self, shape: Format, request: GenerationRequest, model: str) -> None:
        self.request = request
        self._shape = shape
        self.id = f"{shape.id_prefix}-{request.request_id or uuid.uuid4().hex}"
        self._common: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}
        self._prompts: dict[int, RequestOutput] = {}
        self._completion_tokens = 0

    def whole(self, results: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        for position, result in enumerate(results):
            self._count(position, result)
        choices = [one for position, result in enumerate(results) for one in self._shape.choices(position, result)]
        extras = self._shape.extras(results)
        return {**self._common, "object": self._shape.object, "choices": choices, "usage": self._usage(), **extras}

    def frames(self, position: int, part: RequestOutput) -> bytes:
        """The events of one delta; nothing where it has nothing to show."""
        self._count(position, part)
        return b"".join(self._chunk([choice]) for choice in self._shape.chunks(position, part))

    def usage_frame(self) -> bytes:
        """The last event, where it was asked for: no choice, all the usage."""
        return self._chunk([], self._usage())

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = {**self._common, "object": self._shape.chunk_object, "choices": choices}
        if self.request.wants_usage:
            body["usage"] = self._usage() if self.request.wants_running_usage else usage
        return _frame(body)

    def _count(self, position: int, part: RequestOutput) -> None:
        self._prompts[position] = part
        self._completion_tokens += sum(len(output.token_ids) for output in part.outputs)

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(part.prompt_token_ids) for part in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(part.num_cached_tokens for part in self._prompts.values())},
        }


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")


def _frame(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
