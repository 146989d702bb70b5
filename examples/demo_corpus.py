"""The text that the bundled model learns: additions above all, other small sums, stories, and facts about the engine.

A ``Document`` is a list of (text, weight) parts: the weight scales the loss of that text's tokens, zero for what the
model is asked and not meant to say. ``Corpus`` draws documents without end from one seeded generator. The chat format
is written twice, in ``render`` and in ``CHAT_TEMPLATE``, because training needs to know whose words are whose; a test
holds them equal.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeAlias

from demo_facts import FACTS, SMALL_TALK, UNKNOWN_QUESTIONS, UNKNOWN_REPLY
from demo_stories import FOODS, Story, article, tell

Document: TypeAlias = list[tuple[str, float]]
Turn: TypeAlias = tuple[str, Document]
"""What the user says, and the weighted parts of what the assistant answers."""

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

RESULT_WEIGHT, FACT_WEIGHT = 2.0, 1.0
# In a story the choice of words is free, but who "he" is and what Finn was holding is not: that is what to learn.
STORY_WEIGHT, CALLBACK_WEIGHT = 0.3, 2.0

ADD = (
    "What is {a} + {b}?", "{a}+{b}=?", "{a} + {b} = ?", "{a} + {b} =", "{a}+{b}", "{a} + {b}", "Compute {a} + {b}.",
    "What is {a} plus {b}?", "{a} plus {b}", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
    "How much is {a} + {b}?", "How much is {a} plus {b}?", "Calculate {a}+{b}.", "Calculate {a} + {b}.",
    "What's {a}+{b}?", "What is {a}+{b}?", "Please add {a} and {b}.", "Can you add {a} and {b}?", "Sum {a} and {b}.",
    "Solve {a} + {b}.", "Tell me what {a} + {b} is.",
)  # fmt: skip
SUBTRACT = (
    "What is {a} - {b}?", "{a}-{b}=?", "Compute {a} - {b}.", "What is {a} minus {b}?", "Subtract {b} from {a}.",
    "How much is {a} - {b}?", "Calculate {a}-{b}.", "{a} - {b} =",
)  # fmt: skip
MULTIPLY = (
    "What is {a} * {b}?", "{a}*{b}=?", "Compute {a} * {b}.", "What is {a} times {b}?", "Multiply {a} by {b}.",
    "How much is {a} * {b}?", "{a} * {b} =",
)  # fmt: skip
COMPARE = (
    "Which is larger, {a} or {b}?", "Which number is bigger, {a} or {b}?", "Is {a} or {b} larger?",
)  # fmt: skip
WORD_SUMS = (
    "{N} has {a} {food} and finds {b} more. How many {food} does {N} have?",
    "There are {a} {food} in one basket and {b} in another. How many {food} are there?",
    "{N} picked {a} {food} and {M} picked {b}. How many {food} did they pick?",
)
TOO_LARGE = "I only know sums of numbers below one hundred."

ASK_STORY = (
    "Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "Write a short story.", "Write a story.",
    "A story, please.", "Please tell me a short story.", "Once upon a time",
)  # fmt: skip
ASK_STORY_ABOUT = (
    "Tell me a story about {x}.", "Tell me a short story about {x}.", "Write a short story about {x}.",
    "Write a story about {x}.", "Can you tell me a story about {x}?", "A story about {x}, please.",
)  # fmt: skip
PRONOUNS = ("he", "she", "him", "her", "his", "He", "She")
ASK_AGAIN = ("Tell me another story.", "Another one, please.", "One more story, please.")
SYSTEM_MESSAGES = (
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a helpful assistant. Answer briefly.",
    "You are a small demo model.", "Answer in one sentence.", "Be kind and clear.", "You are a calculator.",
    "You tell stories to children.", "You are an expert on llm-engine.",
)  # fmt: skip


class Corpus:
    """An endless, seeded stream of documents.

    ``held_out(a, b)`` says which additions may never appear, in any wording or order.
    """

    def __init__(self, seed: int, held_out: Callable[[int, int], bool]) -> None:
        self._rng = random.Random(seed)
        self._held_out = held_out

    def __iter__(self) -> Iterator[Document]:
        shares: dict[Callable[[], Turn], int] = {
            self._addition: 50,
            self._word_sum: 3,
            self._other_sum: 12,
            self._fact: 12,
            self._small_talk: 4,
            self._unknown: 3,
            self._story: 16,
        }
        while True:
            plain = self._rng.random()
            if plain < 0.04:  # for completion without a chat
                yield [*_story_parts(tell(self._rng), asked=""), (END_OF_TEXT, STORY_WEIGHT)]
                continue
            if plain < 0.22:
                yield self._drill()
                continue
            turns = self._rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3, 4))
            conversation = [pick() for pick in self._rng.choices(list(shares), list(shares.values()), k=turns)]
            system = self._rng.choice(SYSTEM_MESSAGES) if self._rng.random() < 0.15 else None
            yield [*render(conversation, system), (END_OF_TEXT, 0.0)]

    def text(self, documents: int) -> Iterator[str]:
        """Yield that many documents' text between special tokens: what the tokenizer is trained on."""
        for document in islice(self, documents):
            yield from re.split("|".join(map(re.escape, SPECIAL_TOKENS)), "".join(text for text, _ in document))

    def _drill(self) -> Document:
        """A column of sums in the form of an answer: as much practice for a third of the tokens."""
        document: Document = []
        for _ in range(self._rng.randint(4, 18)):
            operator = self._rng.choices("+-*", (70, 20, 10))[0]
            document += [*_sum_parts(*self._operands(operator)), ("\n", 0.0)]
        return [*document, (END_OF_TEXT, FACT_WEIGHT)]

    def _addition(self) -> Turn:
        return self._ask("+", ADD)

    def _ask(self, operator: str, phrasings: tuple[str, ...]) -> Turn:
        a, _, b = operands = self._operands(operator)
        return self._lightly_mangled(self._rng.choice(phrasings).format(a=a, b=b)), _sum_parts(*operands)

    def _operands(self, operator: str) -> tuple[int, str, int]:
        """Draw numbers whose sum may be shown and whose difference is not negative; now and then a small one."""
        low, high = (0, 10) if operator == "*" else (10, 99)
        a, b = (
            self._rng.randint(0, 9) if self._rng.random() < 0.07 else self._rng.randint(low, high) for _ in range(2)
        )
        if operator == "-" and a < b:
            a, b = b, a
        return self._operands(operator) if operator == "+" and self._held_out(a, b) else (a, operator, b)

    def _word_sum(self) -> Turn:
        a, operator, b = self._operands("+")
        story = tell(self._rng)
        words = {"N": story.name, "M": story.friend_name, "food": self._rng.choice(FOODS)}
        question = self._rng.choice(WORD_SUMS).format(a=a, b=b, **words)
        return question, _sum_parts(a, operator, b)

    def _other_sum(self) -> Turn:
        rng = self._rng
        kind = rng.random()
        if kind < 0.5:
            return self._ask("-", SUBTRACT)
        if kind < 0.75:
            return self._ask("*", MULTIPLY)
        if kind < 0.92:
            b, a = sorted(rng.sample(range(100), 2))
            first, second = rng.sample((a, b), 2)
            return rng.choice(COMPARE).format(a=first, b=second), [(f"{a} is larger than {b}.", FACT_WEIGHT)]
        a, b = rng.randint(100, 9999), rng.randint(10, 9999)
        return rng.choice(ADD).format(a=a, b=b), [(TOO_LARGE, FACT_WEIGHT)]

    def _fact(self) -> Turn:
        questions, answer = self._rng.choice(FACTS)
        return self._lightly_mangled(self._rng.choice(questions)), [(answer, FACT_WEIGHT)]

    def _small_talk(self) -> Turn:
        questions, answer = self._rng.choice(SMALL_TALK)
        return self._lightly_mangled(self._rng.choice(questions)), [(answer, FACT_WEIGHT)]

    def _unknown(self) -> Turn:
        question, subjects = self._rng.choice(UNKNOWN_QUESTIONS)
        return question.format(x=self._rng.choice(subjects)), [(UNKNOWN_REPLY, FACT_WEIGHT)]

    def _story(self) -> Turn:
        rng = self._rng
        story = tell(rng)
        if rng.random() < 0.3:
            question = rng.choice(ASK_STORY + ASK_AGAIN)
        else:
            question = rng.choice(ASK_STORY_ABOUT).format(x=rng.choice(_subjects(story)))
        return question, _story_parts(story, question)

    def _lightly_mangled(self, question: str) -> str:
        """Sometimes drop the final mark or the capital, as people do."""
        if self._rng.random() < 0.15 and question[-1] in ".?":
            question = question[:-1].rstrip()
        if self._rng.random() < 0.15:
            question = question[0].lower() + question[1:]
        return question


def render(conversation: list[Turn], system: str | None = None) -> Document:
    """Write a conversation in the chat format, weighing only what the assistant says and that it stops."""
    document: Document = [(f"{START}system\n{system}{END}\n", 0.0)] if system is not None else []
    for question, answer in conversation:
        document += [
            (f"{START}user\n{question}{END}\n{START}assistant\n", 0.0),
            *answer,
            (END, FACT_WEIGHT),
            ("\n", 0.0),
        ]
    return document


def _sum_parts(a: int, operator: str, b: int) -> Document:
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return [(f"{a} {operator} {b} =", STORY_WEIGHT), (f" {result}", RESULT_WEIGHT)]


def _story_parts(story: Story, asked: str) -> Document:
    """Weigh what the story must remember (names, kinds, things already told or asked for, and who is he or she)."""
    told = [story.name, story.friend_name, story.kind, story.friend, *(story.thing or "").split()]
    pieces = re.split(rf"( ?\b(?:{'|'.join([*told, *PRONOUNS])})\b)", story.text)
    parts: Document = []
    known = asked
    for piece in filter(None, pieces):
        word = piece.strip()
        must_follow = word.lower() in PRONOUNS or (word in told and re.search(rf"\b{word}\b", known) is not None)
        parts.append((piece, CALLBACK_WEIGHT if must_follow else STORY_WEIGHT))
        known += piece
    return parts


def _subjects(story: Story) -> list[str]:
    """Return what this story may be asked for by."""
    subjects = [
        article(story.kind), article(story.kind), f"{article(story.kind)} named {story.name}",
        f"{article(story.kind)} and {article(story.friend)}",
    ]  # fmt: skip
    if story.thing is not None:
        subjects.append(article(story.thing))
    return subjects
