"""The score: seeded questions, and the rule that judges a reply."""

import re

import pytest
from demo_score import addition_questions, held_out_questions, is_correct, is_held_out


def test_the_same_seed_asks_the_same_questions() -> None:
    assert addition_questions(50, seed=3) == addition_questions(50, seed=3)
    assert addition_questions(50, seed=3) != addition_questions(50, seed=4)
    assert addition_questions(20, seed=3) == addition_questions(50, seed=3)[:20]


def test_every_question_names_two_two_digit_numbers_and_expects_their_sum() -> None:
    for messages, expected in addition_questions(300, seed=1) + held_out_questions():
        (message,) = messages
        a, b = map(int, re.findall(r"\d+", message["content"]))
        assert message["role"] == "user"
        assert 10 <= a <= 99 and 10 <= b <= 99
        assert expected == str(a + b)


def test_held_out_pairs_are_symmetric_and_about_one_in_twenty() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    assert 0.04 < sum(is_held_out(a, b) for a, b in pairs) / len(pairs) < 0.06
    assert len(held_out_questions()) == sum(is_held_out(a, b) for a, b in pairs)


@pytest.mark.parametrize("reply", ["132", "47 + 85 = 132", "It is 132.", "  132\n"])
def test_a_reply_ending_in_the_sum_is_correct(reply: str) -> None:
    assert is_correct(reply, "132")


@pytest.mark.parametrize("reply", ["", "I do not know.", "1320", "132 or 133", "-", "13 2", "47 + 85 = 131"])
def test_any_other_reply_is_wrong(reply: str) -> None:
    assert not is_correct(reply, "132")
