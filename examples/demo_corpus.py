"""The text that the bundled model learns: additions above all, other small sums, stories, and facts about the engine.

A ``Document`` is a list of (text, weight) parts: the weight scales the loss of that text's tokens, zero for what the
model is asked and not meant to say. ``Corpus`` draws documents without end from one seeded generator. The chat format
is written twice, in ``render`` and in ``CHAT_TEMPLATE``, because training needs to know whose words are whose; a test
holds them equal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TypeAlias

from demo_facts import FACTS, SMALL_TALK, UNKNOWN_QUESTIONS, UNKNOWN_REPLY
from demo_stories import FOODS, Story, article, tell

Document: TypeAlias = list[tuple[str, float]]
Turn: TypeAlias = tuple[str, str, float]
"""What the user says, what the assistant answers, and the weight of the answer."""

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ADDITION_WEIGHT, FACT_WEIGHT, STORY_WEIGHT = 2.0, 1.0, 0.5

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
            self._addition: 60,
            self._word_sum: 3,
            self._other_sum: 9,
            self._fact: 12,
            self._small_talk: 3,
            self._unknown: 3,
            self._story: 10,
        }
        while True:
            plain = self._rng.random()
            if plain < 0.04:  # for completion without a chat
                yield [(tell(self._rng).text + END_OF_TEXT, STORY_WEIGHT)]
                continue
            if plain < 0.19:
                yield self._drill()
                continue
            turns = self._rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3, 4))
            conversation = [pick() for pick in self._rng.choices(list(shares), list(shares.values()), k=turns)]
            system = self._rng.choice(SYSTEM_MESSAGES) if self._rng.random() < 0.15 else None
            yield [*render(conversation, system), (END_OF_TEXT, 0.0)]

    def text(self, documents: int) -> Iterator[str]:
        """Yield that many documents as bare text, special tokens and all: what the tokenizer is trained on."""
        for _, document in zip(range(documents), self, strict=False):
            yield "".join(text for text, _ in document)

    def _drill(self) -> Document:
        """A column of sums in the form of an answer: as much practice for a third of the tokens."""
        document: Document = []
        for _ in range(self._rng.randint(4, 18)):
            a, b = self._addends()
            document += [(f"{a} + {b} =", 0.0), (f" {a + b}\n", ADDITION_WEIGHT)]
        return [*document, (END_OF_TEXT, ADDITION_WEIGHT)]

    def _addition(self) -> Turn:
        a, b = self._addends()
        return self._lightly_mangled(self._rng.choice(ADD).format(a=a, b=b)), f"{a} + {b} = {a + b}", ADDITION_WEIGHT

    def _addends(self) -> tuple[int, int]:
        low = 0 if self._rng.random() < 0.1 else 10
        a, b = self._rng.randint(low, 99), self._rng.randint(low, 99)
        return self._addends() if self._held_out(a, b) else (a, b)

    def _word_sum(self) -> Turn:
        a, b = self._addends()
        story = tell(self._rng)
        words = {"N": story.name, "M": story.friend_name, "food": self._rng.choice(FOODS)}
        question = self._rng.choice(WORD_SUMS).format(a=a, b=b, **words)
        return question, f"{a} + {b} = {a + b}", ADDITION_WEIGHT

    def _other_sum(self) -> Turn:
        rng = self._rng
        a, b = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
        kind = rng.random()
        if kind < 0.45:
            return self._lightly_mangled(rng.choice(SUBTRACT).format(a=a, b=b)), f"{a} - {b} = {a - b}", 1.0
        if kind < 0.75:
            a, b = rng.randint(0, 10), rng.randint(0, 10)
            return self._lightly_mangled(rng.choice(MULTIPLY).format(a=a, b=b)), f"{a} * {b} = {a * b}", 1.0
        if kind < 0.92:
            first, second = rng.sample((a, b), 2)
            answer = f"{a} is larger than {b}." if a != b else "They are equal."
            return rng.choice(COMPARE).format(a=first, b=second), answer, 1.0
        a, b = rng.randint(100, 9999), rng.randint(10, 9999)
        return rng.choice(ADD).format(a=a, b=b), TOO_LARGE, FACT_WEIGHT

    def _fact(self) -> Turn:
        questions, answer = self._rng.choice(FACTS)
        return self._lightly_mangled(self._rng.choice(questions)), answer, FACT_WEIGHT

    def _small_talk(self) -> Turn:
        questions, answer = self._rng.choice(SMALL_TALK)
        return self._lightly_mangled(self._rng.choice(questions)), answer, FACT_WEIGHT

    def _unknown(self) -> Turn:
        question, subjects = self._rng.choice(UNKNOWN_QUESTIONS)
        return question.format(x=self._rng.choice(subjects)), UNKNOWN_REPLY, FACT_WEIGHT

    def _story(self) -> Turn:
        rng = self._rng
        story = tell(rng)
        subjects = _subjects(story)
        if rng.random() < 0.3:
            return rng.choice(ASK_STORY + ASK_AGAIN), story.text, STORY_WEIGHT
        return rng.choice(ASK_STORY_ABOUT).format(x=rng.choice(subjects)), story.text, STORY_WEIGHT

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
    for question, answer, weight in conversation:
        document += [
            (f"{START}user\n{question}{END}\n{START}assistant\n", 0.0),
            (f"{answer}{END}", weight),
            ("\n", 0.0),
        ]
    return document


def _subjects(story: Story) -> list[str]:
    """Return what this story may be asked for by."""
    subjects = [
        article(story.kind), article(story.kind), f"{article(story.kind)} named {story.name}",
        f"{article(story.kind)} and {article(story.friend)}",
    ]  # fmt: skip
    if story.thing is not None:
        subjects.append(article(story.thing))
    return subjects
