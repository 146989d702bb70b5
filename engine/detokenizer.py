"""One choice's text as its tokens arrive, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tokenizer import Tokenizer


class Detokenizer:
    """Appends tokens, releases text. Used by one thread, never under the state lock.

    Text that may be the beginning of a stop string is held back until it is clear; so is an unfinished character. Stop
    strings are not looked for in the text of the first ``min_tokens`` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        """All text so far, cut at the stop string once one was found."""
        self.stop_found: str | None = None
        self._released = 0
        self._tokenizer, self._stop, self._include_stop = tokenizer, tuple(stop), include_stop
        self._skip_special = skip_special
        self._min_tokens = min_tokens
        self._searched = 0
        """Where in ``text`` a stop string may begin at the earliest."""
        self._held_back = max((len(word) for word in self._stop), default=1) - 1
        self._stream = self._new_stream([])
        self._backend = tokenizer.backend
        self._ids: list[int] = []
        self._num_told = 0
        """Tokens whose text is in ``text``; those after it are pieces of a character so far."""

    def add(self, token_ids: Sequence[int]) -> int:
        """Take new tokens; how many of them were used before a stop string was found (all, if none was)."""
        for used, token_id in enumerate(token_ids, start=1):
            self._ids.append(token_id)
            piece = self._step(token_id)
            if piece is not None:
                self._num_told = len(self._ids)
            if piece and self._find_stop(piece):
                return used
        return len(token_ids)

    def finish(self) -> None:
        """No more tokens will come: what was held back becomes text."""
        if self._num_told < len(self._ids) and self.stop_found is None:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
            self._find_stop(whole[len(self.text) :] if whole.startswith(self.text) else self._decode_untold())
        self._held_back = 0

    def release(self) -> str:
        """The text that became certain since the last call."""
        end = len(self.text) if self.stop_found is not None else len(self.text) - self._held_back
        if end <= self._released:
            return ""
        start, self._released = self._released, end
        return self.text[start:end]

    def _step(self, token_id: int) -> str | None:
        """The text that a token completes; ``None`` while a character lacks pieces."""
        try:
            piece: str | None = self._stream.step(self._backend, token_id)
            return piece
        except Exception:  # noqa: BLE001 - tokenizers raises no narrower class
            # With byte fallback, bytes that turn out to be no character change how those before them read, and the
            # stream refuses every token from then on. What was told stays told; a new stream begins behind it.
            self._stream = self._new_stream([token_id])
            return self._decode_untold()

    def _decode_untold(self) -> str:
        return self._tokenizer.decode(self._ids[self._num_told :], skip_special_tokens=self._skip_special)

    def _new_stream(self, ids: list[int]) -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=ids, skip_special_tokens=self._skip_special)

    def _find_stop(self, piece: str) -> bool:
        searched = max(len(self.text) - self._held_back, self._searched)
        self.text += piece
        if len(self._ids) <= self._min_tokens:
            self._searched = len(self.text)
            return False
        hits = [(at, word) for word in self._stop if (at := self.text.find(word, searched)) >= 0]
        if not hits:
            return False
        at, word = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.stop_found = word
        self.text = self.text[: at + len(word) if self._include_stop else at]
        return True
