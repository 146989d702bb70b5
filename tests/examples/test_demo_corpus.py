"""The text the bundled model learns from: correct, seeded, and free of the sums kept for judging."""

import random
import re
from itertools import islice

from demo_corpus import END, END_OF_TEXT, START, Corpus, Document
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
        text = "".join(part for part, _ in document)
        for a, operator, b, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text):
            left, right = int(a), int(b)
            assert int(result) == {"+": left + right, "-": left - right, "*": left * right}[operator]
            assert operator != "+" or not is_held_out(left, right)
            seen += 1
    assert seen > 5000


def test_only_the_assistants_words_are_weighed_in_a_chat() -> None:
    for document in documents(1, 500):
        if any(START in text for text, _ in document):
            unweighed = [text for text, weight in document if weight == 0]
            assert all(START in text or text in ("\n", END_OF_TEXT) for text in unweighed)
            assert not any(START in text for text, weight in document if weight > 0)
            assert all(weight > 0 for text, weight in document if text == END)


def test_every_document_ends_and_teaches_something() -> None:
    for document in documents(2, 500):
        assert "".join(text for text, _ in document).endswith(END_OF_TEXT)
        assert any(weight > 0 for _, weight in document)


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
