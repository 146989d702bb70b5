"""Text as its tokens arrive, with the bundled model's tokenizer: stop strings, held-back text, characters in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import llm_engine
from llm_engine.engine.detokenizer import Detokenizer
from llm_engine.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer(str(Path(llm_engine.__file__).parent / "models" / "demo_model"))
TEXTS = [
    "Hello wörld 🙂 12+34",
    "Once upon a time there was a fox.",
    "naïve café — 你好 🙂🙂",
    "  two  spaces\n\nand lines ",
]
END = TOKENIZER.encode("<|im_end|>")[0]


class ByteFallback(Tokenizer):
    """As Llama 2's, Mistral's and Gemma's: a byte a token where there is no word."""

    WORDS = ("\u2581a", "\u2581b", "hello", "é")

    def __init__(self) -> None:
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
        vocabulary |= {word: 256 + at for at, word in enumerate(self.WORDS)}
        self._byte_fallback = Backend(models.BPE(vocabulary, [], byte_fallback=True))
        self._byte_fallback.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    @property
    def backend(self) -> Backend:
        return self._byte_fallback


def feed(detokenizer: Detokenizer, ids: list[int]) -> tuple[list[str], int]:
    """What is released after each token, and how many tokens were used."""
    released, used = [], 0
    for token in ids:
        used += detokenizer.add([token])
        released.append(detokenizer.release())
        if detokenizer.stop_found is not None:
            break
    return released, used


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    detokenizer = Detokenizer(TOKENIZER)
    released, used = feed(detokenizer, ids)
    detokenizer.finish()
    released.append(detokenizer.release())
    assert "".join(released) == text == TOKENIZER.decode(ids) == detokenizer.text
    assert used == len(ids)


def test_a_character_in_pieces_waits_for_its_last() -> None:
    ids = TOKENIZER.encode("🙂")
    assert len(ids) > 1, "else this shows nothing"
    released, _ = feed(Detokenizer(TOKENIZER), ids)
    assert released == [""] * (len(ids) - 1) + ["🙂"]


def test_a_character_that_is_never_finished_is_shown_at_the_end_as_the_tokenizer_shows_it() -> None:
    ids = TOKENIZER.encode("a🙂")[:-1]
    detokenizer = Detokenizer(TOKENIZER)
    released, _ = feed(detokenizer, ids)
    assert "".join(released) == "a"
    detokenizer.finish()
    assert detokenizer.release() == TOKENIZER.decode(ids)[1:]
    assert detokenizer.text == TOKENIZER.decode(ids)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Once upon a time", ("on a",), "Once up"),
        ("Once upon a time", ("O",), ""),
        ("Once upon a time", ("time",), "Once upon a "),
        ("Once upon a time", ("zzz", "upon"), "Once "),
        ("Once upon a time", ("pon a t", "on a"), "Once up"),
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("wörld 🙂 end", ("🙂",), "wörld "),
    ],
)  # fmt: skip
def test_a_stop_string_ends_the_text_wherever_the_tokens_begin(
    text: str, stop: tuple[str, ...], expected: str, include: bool
) -> None:
    ids = TOKENIZER.encode(text)
    detokenizer = Detokenizer(TOKENIZER, stop=stop, include_stop=include)
    released, used = feed(detokenizer, ids)
    assert detokenizer.stop_found is not None
    whole = expected + (detokenizer.stop_found if include else "")
    assert detokenizer.text == whole == "".join(released)
    assert detokenizer.stop_found not in TOKENIZER.decode(ids[: used - 1]), "the token that completed it is the last"
    assert detokenizer.stop_found in TOKENIZER.decode(ids[:used])


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=("upon a time", "upon"))
    feed(detokenizer, TOKENIZER.encode("Once upon a time"))
    assert (detokenizer.stop_found, detokenizer.text) == ("upon", "Once ")


def test_text_is_held_back_while_it_may_begin_a_stop_string() -> None:
    ids = TOKENIZER.encode("Once upon a time there was")
    detokenizer = Detokenizer(TOKENIZER, stop=("THE END",))
    released, _ = feed(detokenizer, ids)
    shown = "".join(released)
    assert shown == "Once upon a time there was"[: -len("HE END")]
    detokenizer.finish()
    assert shown + detokenizer.release() == "Once upon a time there was"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*TOKENIZER.encode("yes"), END, *TOKENIZER.encode(" no")]
    for skip, text in ((True, "yes no"), (False, "yes<|im_end|> no")):
        detokenizer = Detokenizer(TOKENIZER, skip_special=skip)
        feed(detokenizer, ids)
        detokenizer.finish()
        assert detokenizer.text == text


def test_a_stop_string_may_be_a_special_token_where_these_are_shown() -> None:
    ids = [*TOKENIZER.encode("yes"), END, *TOKENIZER.encode(" no")]
    shown = Detokenizer(TOKENIZER, stop=("<|im_end|>",), skip_special=False)
    feed(shown, ids)
    assert shown.text == "yes"
    hidden = Detokenizer(TOKENIZER, stop=("<|im_end|>",))
    feed(hidden, ids)
    assert hidden.stop_found is None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, TOKENIZER.backend.get_vocab_size() - 1), max_size=40),
    st.lists(st.text("abeot n🙂", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_any_tokens_in_any_portions(ids: list[int], stop: list[str], include: bool) -> None:
    """One by one or all at once: the same text, and never more released than stays."""
    one, whole = (Detokenizer(TOKENIZER, stop=stop, include_stop=include) for _ in range(2))
    released, used = feed(one, ids)
    used_at_once = whole.add(ids)
    for detokenizer in (one, whole):
        detokenizer.finish()
    released.append(one.release())
    assert "".join(released) == one.text == whole.text == whole.release()
    assert (used, one.stop_found) == (used_at_once, whole.stop_found)
    assert TOKENIZER.decode(ids).startswith(one.text) or "�" in TOKENIZER.decode(ids)
    if one.stop_found is None:
        assert not any(word in one.text for word in stop)


def test_bytes_that_are_no_character_end_nobodys_answer() -> None:
    tokenizer = ByteFallback()
    detokenizer = Detokenizer(tokenizer, stop=["b!"])
    released, used = feed(detokenizer, [256, ord("A"), 0xFF, 257, 258, *"é!".encode(), 257, ord("!"), 256])
    assert detokenizer.text == "aA\ufffd bhelloé! "
    assert (detokenizer.stop_found, used) == ("b!", 10)
    assert "".join(released) == detokenizer.text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([ord("A"), 0xC3, 0xA9, 0xFF, 256, 257, 258, 259]), max_size=30))
def test_any_tokens_make_a_text_that_only_grows(ids: list[int]) -> None:
    detokenizer = Detokenizer(ByteFallback())
    released, used = feed(detokenizer, ids)
    detokenizer.finish()
    released.append(detokenizer.release())
    assert used == len(ids)
    assert "".join(released) == detokenizer.text
    words = sum(token > 255 for token in ids)
    assert sum(detokenizer.text.count(letter) for letter in ("a", "b", "hello", "é")) >= words


@pytest.mark.parametrize(("min_tokens", "text", "num_used"), [(0, "a", 2), (1, "a", 2), (2, "a!b", 4)])
def test_no_stop_string_is_found_in_the_first_tokens(min_tokens: int, text: str, num_used: int) -> None:
    ids = [token for character in "a!b!" for token in TOKENIZER.encode(character)]
    assert len(ids) == 4, "else min_tokens means other characters"
    detokenizer = Detokenizer(TOKENIZER, stop=["!"], min_tokens=min_tokens)
    _, used = feed(detokenizer, ids)
    assert (detokenizer.text, detokenizer.stop_found, used) == (text, "!", num_used)


def test_a_stop_string_does_not_begin_before_min_tokens() -> None:
    ids = TOKENIZER.encode("a") + TOKENIZER.encode("b")
    assert len(ids) == 2
    detokenizer = Detokenizer(TOKENIZER, stop=["ab"], min_tokens=1)
    feed(detokenizer, ids)
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stop_found) == ("ab", None)
