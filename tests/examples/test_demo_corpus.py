"""The text the bundled model learns from: correct, seeded, and free of the sums kept for judging."""

import random
import re
from itertools import islice

from demo_corpus import END, END_OF_TEXT, Corpus, Document
from demo_score import is_held_out
from demo_stories import KINDS, PLOTS, tell


def documents(seed: int, count: int) -> list[Document]:
    return list(islice(Corpus(seed, is_held_out), count))


def test_a_seed_fixes_the_text() -> None:
    assert documents(5, 50) == documents(5, 50)
    assert documents(5, 50) != documents(6, 50)


def test_every_sum_is_right_and_none_is_held_out() -> None:
    seen = 0
    for document in documents(0, 3000):
        for text, weight in document:
            if match := re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)<\|im_end\|>", text):
                a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
                assert result == {"+": a + b, "-": a - b, "*": a * b}[operator]
                assert weight > 0
                assert operator != "+" or not is_held_out(a, b)
                seen += 1
    assert seen > 1000


def test_only_the_assistants_words_and_plain_text_are_weighed() -> None:
    for document in documents(1, 500):
        for text, weight in document:
            spoken = (text.endswith(END) and "<|im_start|>" not in text) or len(document) == 1
            assert (weight > 0) == spoken, text
        assert "".join(text for text, _ in document).endswith(END_OF_TEXT)


def test_stories_are_whole_sentences_about_what_they_claim() -> None:
    rng = random.Random(7)
    stories = [tell(rng) for _ in range(400)]
    assert len({story.text for story in stories}) == len(stories)
    for story in stories:
        assert re.search(rf"\b{story.kind}\b", story.text) and story.name in story.text
        assert story.thing is None or story.thing in story.text
        assert story.text[0].isupper() and story.text[-1] == "."
        assert not re.search(r"[{}]|  | ,|\ba [aeiou]|\ban [^aeiou]", story.text), story.text
    assert {story.kind for story in stories} > set(KINDS[:20])


def test_every_plot_has_six_sentences_with_two_wordings() -> None:
    assert [[len(wordings) for wordings in plot] for plot in PLOTS] == [[2] * 6] * 10
