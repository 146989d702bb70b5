"""Text to ids and back, and chat templates: transformers' tokenizer, loaded when first needed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import InvalidParamsError, ModelLoadError

Message = Mapping[str, Any]


class Tokenizer:
    """Any thread may call it. Loading (seconds) happens once, at the first call that needs it."""

    def __init__(self, path: str, *, revision: str | None = None, cache_dir: str | None = None) -> None:
        self._path, self._revision, self._cache_dir = path, revision, cache_dir
        self._lock = threading.Lock()
        self._loaded: Any = None

    @property
    def hf(self) -> Any:
        """The transformers tokenizer. Raises ``ModelLoadError`` where the folder has none that is fast."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    @property
    def backend(self) -> Any:
        """The ``tokenizers.Tokenizer`` under it: immutable in use, so threads need no lock."""
        return self.hf.backend_tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises ``UnicodeEncodeError`` for one with half of a surrogate pair in it."""
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            text.encode()  # tokenizers does not say what is wrong; this does
            raise
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token alone; a part of a character shows as the replacement character."""
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
    ) -> list[int]:
        """Ids of a conversation through the checkpoint's chat template. Raises ``InvalidParamsError("messages")``."""
        check_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise InvalidParamsError(
                "continue_final_message", True, "false while add_generation_prompt is true: they exclude each other"
            )
        import jinja2

        if chat_template is None and not self.hf.chat_template:
            raise InvalidParamsError("messages", "a conversation", "plain prompts: the model has no chat template")
        try:
            text = self.hf.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
            )
            return self.encode(text, add_special_tokens=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            allowed = f"a conversation the chat template accepts ({error})"
            raise InvalidParamsError("messages", messages, allowed) from error

    def bad_words_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Each word's ids as it reads at the start of a text and after a space; doubles are left out."""
        found: list[list[int]] = []
        for word in words:
            for text in (word, " " + word):
                ids = self.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found

    def _load(self) -> Any:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(self._path, revision=self._revision, cache_dir=self._cache_dir)
        except Exception as error:
            raise ModelLoadError(f"no tokenizer in {self._path}: {error}") from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise ModelLoadError(f"the tokenizer in {self._path} has no fast version (tokenizer.json)")
        backend.no_truncation()
        backend.no_padding()
        return loaded


def check_messages(messages: Any) -> None:
    """Raise ``InvalidParamsError`` unless it is a list of messages with a role and content."""
    allowed = "a list of at least one message, each a map with a role and content"
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidParamsError("messages", messages, allowed)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidParamsError(f"messages[{index}]", message, "a map with a role (a string) and content")
        if not isinstance(message.get("content"), str | list | None):
            raise InvalidParamsError(f"messages[{index}].content", message["content"], "a string")
