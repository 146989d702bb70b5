"""What clients send: OpenAI's fields and vLLM's additions, checked for type here and for value by the engine.

Types are strict (``"0.5"`` is no number). Unknown fields are accepted and logged. What is known, unsupported and would
change the answer is refused: silence would be a wrong answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import InvalidParamsError
from .http_errors import ApiError

log = logging.getLogger("llm_engine.server")

MAX_PROMPTS = 256
_UNSUPPORTED = (
    "tools", "functions", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "prompt_embeds", "use_beam_search", "chat_template", "audio", "suffix",
)  # fmt: skip


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(_Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(_Fields):
    type: str


class GenerationRequest(_Fields):
    """The fields that both endpoints share. ``None`` means: not given."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: int | None = None
    deadline_ms: float | None = None
    user: str | None = None
    cache_salt: str | None = None
    request_id: str | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return bool(self.wants_usage and self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or many prompts, each text or token ids. Raises ``InvalidParamsError``."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
                return [prompt]
            if len(prompt) > MAX_PROMPTS:
                raise InvalidParamsError("prompt", f"{len(prompt)} prompts", f"at most {MAX_PROMPTS}")
            if all(isinstance(item, str) for item in prompt) or all(_is_ids(item) for item in prompt):
                return prompt
        raise InvalidParamsError("prompt", prompt, "a text, a list of token ids, or a list of either; not empty")


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages with content parts joined into text. Raises ``InvalidParamsError`` naming the part."""
        return [
            {**message, "content": _joined(f"messages[{index}].content", message["content"])}
            if isinstance(message.get("content"), list)
            else message
            for index, message in enumerate(self.messages)
        ]


Request = TypeVar("Request", bound=GenerationRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a body. Raises ``ApiError`` 400 naming the field."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(kind, error) from error
    extra = request.model_extra or {}
    for name in _UNSUPPORTED:
        if extra.get(name):
            raise ApiError(400, f"{name} is not supported by this server", name)
    if request.response_format is not None and request.response_format.type != "text":
        raise ApiError(400, f"response_format is {request.response_format.type!r}; allowed: text", "response_format")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is set; allowed: only together with stream=true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs is set; allowed: only without stream", "prompt_logprobs")
    if extra:
        log.debug("fields ignored: %s", ", ".join(sorted(extra)))
    return request


def _as_api_error(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return ApiError(400, "the body is not a JSON object")
    field = str(first["loc"][0])
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing", field)
    return ApiError(400, str(InvalidParamsError(_where(first["loc"]), first["input"], _allowed(field, first))), field)


def _where(location: Sequence[int | str]) -> str:
    """``messages[3]`` or ``stream_options.include_usage``, as the client wrote it."""
    field, *rest = location
    if field in ("stream_options", "response_format"):
        return ".".join(map(str, location))
    # A field of several types reports an error for each, with the type's name in its place: keep numbers only.
    return str(field) + "".join(f"[{part}]" for part in rest if isinstance(part, int))


def _allowed(field: str, error: Any) -> str:
    return _ALLOWED.get(field) or _TYPES.get(error["type"]) or error["msg"].removeprefix("Input should be ")


_ALLOWED = {
    "stop": "a string or a list of strings",
    "logit_bias": "a map of token id to a number in [-100, 100]",
    "messages": "a list of messages, each a map with a role and content",
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _joined(field: str, parts: Sequence[Any]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidParamsError(f"{field}[{index}]", part, 'a part of type "text"')
        texts.append(text)
    return "\n".join(texts)
