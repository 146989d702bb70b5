"""Log-probabilities in the shapes of the two endpoints."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from ..core.step import TokenLogprobs


class Vocabulary(Protocol):
    """What is asked of the engine's tokenizer."""

    def token_text(self, token_id: int) -> str:
        """The text of one token alone; a part of a character shows as the replacement character."""

    @property
    def backend(self) -> Any:
        """The ``tokenizers.Tokenizer``."""


def chat_logprobs(vocabulary: Vocabulary, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""
    return {
        "content": [
            {
                **_chat_token(vocabulary, entry.token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(vocabulary, token_id, logprob)
                    for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                ],
            }
            for entry in entries
        ]
    }


def _chat_token(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    text = vocabulary.token_text(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(_token_bytes(vocabulary, token_id, text))}


def completion_logprobs(
    vocabulary: Vocabulary, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offset: int
) -> dict[str, Any]:
    """``logprobs`` of a completion choice. ``offset`` is where the tokens begin in the choice's text.

    An entry is ``None`` for the prompt's first token, which nothing predicts.
    """
    tokens = [vocabulary.token_text(token_id) for token_id in token_ids]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(vocabulary, entry) for entry in entries],
        "text_offset": offsets,
    }


def _top(vocabulary: Vocabulary, entry: TokenLogprobs) -> dict[str, float]:
    pairs = [*zip(entry.top_ids, entry.top_logprobs, strict=True), (entry.token_id, entry.logprob)]
    return {vocabulary.token_text(token_id): _finite(logprob) for token_id, logprob in pairs}


def prompt_logprobs(vocabulary: Vocabulary, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each prompt token a map of token id to its log-probability, rank and text."""

    def token(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": vocabulary.token_text(token_id)}

    def position(entry: TokenLogprobs) -> dict[str, Any]:
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        likeliest = {str(token_id): token(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, 1)}
        return {str(entry.token_id): token(entry.token_id, entry.logprob, entry.rank)} | likeliest

    return [None if entry is None else position(entry) for entry in entries]


def _finite(logprob: float) -> float:
    """JSON has no infinities; OpenAI writes -9999 for a token that cannot be."""
    return max(logprob, -9999.0)


def _token_bytes(vocabulary: Vocabulary, token_id: int, text: str) -> bytes:
    """The token's bytes, also where they are only part of a character and the text cannot show them."""
    if "\ufffd" not in text:
        return text.encode()
    written: str | None = vocabulary.backend.id_to_token(token_id)
    if written is None:
        return text.encode()
    if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):  # sentencepiece's byte fallback
        return bytes([int(written[3:5], 16)])
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in written) if all(c in alphabet for c in written) else text.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(rest)}
