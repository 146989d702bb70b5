"""From what a caller asks to requests for the inbox: validates, tokenizes, hashes blocks. In the caller's thread."""

from __future__ import annotations

import operator
import sys
import threading
import time
import uuid
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..core.errors import InvalidParamsError, PromptTooLongError
from ..core.request import Request, RequestId
from ..core.sampling_params import SamplingParams
from ..kvcache.block_hash import extra_key, hash_blocks
from ..kvcache.kv_cache_manager import KVCacheManager
from ..schedulers.registry import orderings_that_know
from ..workers.model_engine import ModelInfo
from .delta import Sink
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
Text = TypeVar("Text")
Ids = TypeVar("Ids")
_MASK = 2**64 - 1
MAX_PRIORITY = 2**31
MAX_TENANT_CHARACTERS = 256


class InputProcessor:
    """Any thread may call it; raises before anything reaches the engine.

    ``knows``: which of ``priority`` and ``deadline_ms`` the scheduler goes by; a request that brings another one is
    refused. ``None``: it does not say, and whatever a request brings is handed on.
    """

    def __init__(
        self,
        model: ModelInfo,
        kv: KVCacheManager,
        tokenizer: Tokenizer | None,
        *,
        max_chunk: int,
        seed: int,
        knows: Container[str] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._kv, self._max_chunk, self._knows = kv, max_chunk, knows
        self._eos = frozenset(model.eos_token_ids)
        self._lock = threading.Lock()
        self._next_id = 0

    def make_requests(
        self,
        prompt: Prompt,
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline_ms: float | None = None,
        tenant: str | None = None,
        adapter_id: str | None = None,
        cache_salt: str | None = None,
    ) -> list[Request]:
        """One request per choice. Raises ``InvalidParamsError`` naming the field, its value and what is allowed.

        What it lets through is plain data that any executor can send: whole numbers of 64 bits, valid Unicode.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidParamsError("sampling_params", params, "SamplingParams")
        request_id, adapter_id = _text("request_id", request_id), _text("adapter_id", adapter_id)
        tenant, cache_salt = _text("tenant", tenant), _text("cache_salt", cache_salt)
        token_ids = self._token_ids(prompt)
        max_total = self._max_total_tokens(len(token_ids), params)
        self._check_params(params, max_total - len(token_ids))
        self._check_urgency(priority, deadline_ms)
        _check_tenant(tenant)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        bad_words: list[list[int]] = []
        if params.bad_words and self._tokenizer is not None:
            bad_words = _encodable("bad_words", params.bad_words, self._tokenizer.bad_words_ids)
        hashes = []
        if self._kv.enable_prefix_caching:
            hashes = hash_blocks(token_ids, self._kv.block_size, known=[], extra=extra_key(adapter_id, cache_salt))
        external_id, arrival, first = request_id or uuid.uuid4().hex, time.monotonic(), self._take_ids(params.n)
        seed = params.seed if params.seed is not None else self._seed * 0x9E3779B97F4A7C15 + first + 1
        # The choices share their prompt: the first one scores it for all.
        others = params if params.n == 1 or params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
        return [
            Request(
                request_id=RequestId(first + index),
                external_id=external_id,
                prompt_token_ids=token_ids,
                params=params if index == 0 else others,
                max_total_tokens=max_total,
                arrival=arrival,
                stop_ids=stop_ids,
                seed=seed & _MASK,
                choice_index=index,
                priority=priority,
                deadline=None if deadline_ms is None else arrival + deadline_ms / 1000,
                tenant=tenant,
                adapter_id=adapter_id,
                cache_salt=cache_salt,
                bad_words_ids=bad_words,
                block_hashes=list(hashes),
                sink=sink,
            )
            for index in range(params.n)
        ]

    def _check_urgency(self, priority: Any, deadline_ms: Any) -> None:
        if not _is_number(priority, int) or abs(priority) > MAX_PRIORITY:
            raise InvalidParamsError("priority", priority, f"a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}")
        most = sys.float_info.max
        if deadline_ms is not None and not (_is_number(deadline_ms, int | float) and 0 < deadline_ms <= most):
            raise InvalidParamsError("deadline_ms", deadline_ms, "a finite number of milliseconds above 0")
        for field, value, otherwise in (("priority", priority or None, "0"), ("deadline_ms", deadline_ms, "none")):
            if value is not None and self._knows is not None and field not in self._knows:
                those = ", ".join(orderings_that_know(field))
                raise InvalidParamsError(
                    field, value, f"{otherwise}, since the ordering in use does not go by it (those that do: {those})"
                )

    def _take_ids(self, count: int) -> int:
        with self._lock:
            first, self._next_id = self._next_id, self._next_id + count
        return first

    def _token_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidParamsError("prompt", prompt, "token ids: this engine has no tokenizer")
            token_ids = _encodable("prompt", prompt, self._tokenizer.encode)
            if token_ids and max(token_ids) >= self._model.vocab_size:
                allowed = f"token ids below {self._model.vocab_size}: the tokenizer is another model's"
                raise InvalidParamsError("prompt", max(token_ids), allowed)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            token_ids = list(prompt)
            vocab = self._model.vocab_size
            for token_id in token_ids:
                if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab:
                    raise InvalidParamsError("prompt", token_id, f"a text, or token ids from 0 to {vocab - 1}")
            token_ids = list(map(operator.index, token_ids))
        else:
            raise InvalidParamsError("prompt", prompt, "a text or a list of token ids")
        if not token_ids:
            raise InvalidParamsError("prompt", prompt, "at least one token")
        return token_ids

    def _max_total_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        limit = self._model.max_model_len
        if num_prompt >= limit:
            raise PromptTooLongError(
                "prompt", f"{num_prompt} tokens", f"at most {limit - 1}, the context of {limit} less one for the answer"
            )
        if params.max_tokens is not None and num_prompt + params.max_tokens > limit:
            raise PromptTooLongError(
                "max_tokens",
                params.max_tokens,
                f"at most {limit - num_prompt}: the context is {limit} and the prompt takes {num_prompt}",
            )
        total = limit if params.max_tokens is None else num_prompt + params.max_tokens
        usable, size = self._kv.num_usable_blocks, self._kv.block_size
        # The last token is sampled but never computed: it needs no room.
        needed = self._kv.peak_blocks(total - 1, self._max_chunk)
        if needed > usable and params.max_tokens is None:
            total = min(total, usable * size + 1)  # "the rest of the context" is what the cache can hold of it
            needed = self._kv.peak_blocks(max(total - 1, num_prompt), self._max_chunk)
        if needed > usable or total <= num_prompt:
            field, value = (
                ("prompt", f"{num_prompt} tokens") if params.max_tokens is None else ("max_tokens", params.max_tokens)
            )
            raise PromptTooLongError(
                field,
                value,
                f"prompt and output of at most {usable * size} tokens, which is all the KV cache holds "
                f"({usable} blocks of {size}); the prompt takes {num_prompt}",
            )
        return total

    def _check_params(self, params: SamplingParams, room: int) -> None:
        if params.min_tokens > room:  # max_tokens is not given, or it would have said so
            raise InvalidParamsError("min_tokens", params.min_tokens, f"at most {room}: there is no room for more")
        vocab = self._model.vocab_size
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token_id in getattr(params, name):
                if token_id >= vocab:
                    raise InvalidParamsError(name, token_id, f"token ids from 0 to {vocab - 1}")
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise InvalidParamsError(name, getattr(params, name), "none: this engine has no tokenizer")
        _encodable("stop", params.stop, lambda words: "".join(words).encode())


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_tenant(tenant: str | None) -> None:
    if tenant is None:
        return
    if not 1 <= len(tenant) <= MAX_TENANT_CHARACTERS:
        raise InvalidParamsError("tenant", tenant, f"a text of 1 to {MAX_TENANT_CHARACTERS} characters")


def _text(field: str, text: Any) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise InvalidParamsError(field, text, "a text")
    return _encodable(field, text, str.encode).decode()


def _encodable(field: str, text: Text, encode: Callable[[Text], Ids]) -> Ids:
    """What ``encode`` makes of the text; raises ``InvalidParamsError`` where it is no valid Unicode."""
    try:
        return encode(text)
    except UnicodeEncodeError as error:
        raise InvalidParamsError(field, text, f"valid Unicode ({error.reason})") from error
