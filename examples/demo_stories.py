"""A small grammar of short stories: a hero, a place, a plot of five to eight sentences, and an ending.

Every sentence has a few wordings, so that a model learns to tell a story and not to recite one. Names and kinds are
sometimes invented words: they teach a small model to carry a word it has never seen through the whole story.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TypeAlias

KINDS = (
    "fox rabbit bear owl mouse duck cat dog hedgehog squirrel turtle frog hen goat pony dragon robot penguin lion "
    "elephant girl boy wolf pig cow sheep monkey tiger horse bird fish snail bee ant crow deer badger otter king queen "
    "farmer sailor baker knight wizard giant"
).split()
SHE = "Lily Mia Anna Rosa Nina Ella Tess Ruby Ivy Clara Luna Hazel".split()
HE = "Finn Tom Ben Max Otto Sam Leo Hugo Oscar Jack Theo Milo".split()
GENDERED = {"girl": "she", "hen": "she", "cow": "she", "queen": "she", "boy": "he", "king": "he"}
PLACES = (
    "near the old mill", "by the river", "in a green valley", "at the edge of the forest", "on a small farm",
    "beside a quiet lake", "on a sunny hill", "in a tiny village", "near the sea", "behind a stone bridge",
)  # fmt: skip
THINGS = (
    "red kite", "blue ball", "silver bell", "wooden boat", "warm scarf", "little drum", "golden key", "green hat",
    "shiny whistle", "soft blanket", "paper lantern", "round stone",
)  # fmt: skip
TRAITS = "little young kind curious brave shy cheerful quiet clever".split()
TIMES = (
    "One sunny morning", "One windy afternoon", "One cold day", "One day", "Early one morning", "One warm evening",
)  # fmt: skip
FOODS = "apples berries nuts carrots plums cakes pears cookies".split()

OPENINGS = (
    "Once upon a time, {a_hero} named {N} lived {place}.",
    "Once upon a time there was {a_hero} named {N}, who lived {place}.",
    "There once was {a_hero} named {N}. {He} lived {place}.",
)

Plot: TypeAlias = tuple[tuple[str, ...], ...]
"""The sentences of a story after its opening, each a tuple of wordings."""


def _read_plots(text: str) -> tuple[Plot, ...]:
    plots: list[list[list[str]]] = []
    for line in text.strip().splitlines():
        if line.startswith("# "):
            plots.append([])
        elif line.startswith("/ "):
            plots[-1][-1].append(line[2:])
        else:
            plots[-1].append([line])
    return tuple(tuple(tuple(wordings) for wordings in plot) for plot in plots)


# One sentence a line, other wordings of it after a slash. {N}, {he}, ... are the hero; {M}, {fhe}, ... the friend.
PLOTS = _read_plots("""
# something is lost and found
{N} had {a_thing} and loved it very much.
/ More than anything, {N} loved {his} {thing}.
{time}, the {thing} was gone.
/ {time}, {N} could not find the {thing}.
{N} looked under the bed and behind the door, but it was not there.
/ {He} looked high and low, but it was nowhere.
Then {a_friend} named {M} came by and asked, "Why are you so sad?"
/ {M} the {friend} saw that {N} was sad and offered to help.
Together they searched {place2}, and there it was.
/ They followed the path until they saw the {thing} lying in the grass.
{N} thanked {M} and let {fhim} play with the {thing}.
/ "Thank you, {M}!" said {N}, and they played until dark.
# too high to reach
{time}, {N} was very hungry.
/ {time}, {N} wanted something sweet to eat.
{He} saw ripe {food} at the top of a tall tree, but {he} could not reach them.
/ There were {food} on a high branch, far too high for {him}.
{N} jumped and jumped, but it was no use.
/ {He} tried to climb, but {he} slid down again and again.
{M} the {friend} was watching and said, "Let us try together."
/ {a_friend_cap} named {M} came by and had an idea.
{N} stood on {M}'s back and shook the branch.
/ {M} held the tree and {N} climbed up step by step.
Soon the {food} fell down, and they shared them all.
/ Down came the {food}, and there was enough for both of them.
# a storm
{time}, {N} went for a long walk.
/ {time}, {N} walked far away from home.
Suddenly the sky grew dark and it began to rain.
/ Then black clouds came and the wind began to blow.
{N} was wet and cold and did not know the way home.
/ {He} was lost, and {he} was afraid of the thunder.
At last {he} saw a light in a small window and knocked on the door.
/ Then {he} saw a little house and knocked.
{a_friend_cap} named {M} opened and said, "Come in and get warm."
/ It was the house of {M} the {friend}, who gave {him} hot soup.
When the rain stopped, {M} showed {N} the way home.
/ In the morning the sun came out, and {M} walked home with {N}.
# the race
{N} was slow, and the others often laughed at {him}.
/ {N} was not very fast, but {he} never gave up.
{time}, {M} the {friend} said, "I can run faster than you!"
/ {time}, {a_friend} named {M} asked {him} to run a race.
"Then let us race to the big tree," said {N}.
/ They agreed to race to the bridge and back.
{M} ran so fast that {fhe} soon had to stop and rest.
/ {M} was far ahead and lay down for a short sleep.
{N} kept going, one step after another.
/ {N} did not stop, not even once.
In the end {N} came first, and {M} said, "Well done!"
/ {N} won the race, and {M} was the first to cheer.
# sharing
{time}, {N} found a basket full of {food}.
/ {time}, {N} picked a big basket of {food}.
"I will keep them all for myself," {he} thought.
/ {He} wanted to eat every one of them alone.
On the way home {he} met {a_friend} named {M}, who had nothing to eat.
/ Then {he} saw {M} the {friend}, who looked hungry and tired.
{N} thought for a moment and sat down beside {fhim}.
/ {N} looked at the basket, and then {he} smiled.
"Take as many as you like," {he} said.
/ "Let us eat together," said {N}.
The {food} tasted much better that way.
/ They ate and laughed, and {N} was glad that {he} had shared.
# helping somebody small
{time}, {N} heard a tiny voice calling for help.
/ {time}, {N} heard someone crying softly.
It was {a_friend} named {M}, who had fallen into a hole.
/ {M} the {friend} was stuck between two stones.
"Do not be afraid," said {N}. "I will help you."
/ "Wait here," said {N}, "I have an idea."
{N} found a long rope and pulled as hard as {he} could.
/ {He} took a strong stick and pushed with all {his} might.
At last {M} was free.
/ One more try, and {M} was safe.
From that day on, {M} came to visit {N} every week.
/ {M} never forgot how kind {N} had been.
# afraid of the dark
{N} was brave by day, but {he} was afraid of the dark.
/ Every night {N} was afraid, because the room was so dark.
{time}, {he} told {his} friend {M} about it.
/ {time}, {N} asked {M} the {friend} what to do.
{M} gave {him} {a_thing} and said, "Hold this when you are afraid."
/ {M} brought {a_thing} and put it beside the bed.
That night {N} held the {thing} and looked out of the window.
/ When it was dark, {N} touched the {thing} and took a deep breath.
The moon was bright, and the stars were like small lamps.
/ Outside, the stars were shining and an owl was singing.
{N} was not afraid any more and fell asleep.
/ Soon {N} smiled and slept until morning.
# a seed
{time}, {N} planted a small seed in the garden.
/ {time}, {N} found a seed and put it into the ground.
{He} gave it water every day and waited.
/ Every day {he} brought fresh water and sat beside it.
But nothing happened, and {N} wanted to give up.
/ Days went by, and there was nothing to see.
"Good things take time," said {M} the {friend}.
/ {a_friend_cap} named {M} told {him}, "You must be patient."
Then, after a warm rain, a green leaf came out of the ground.
/ At last, one morning, there was a tiny green leaf.
By summer it was the most beautiful flower in the garden.
/ It grew and grew, until it was taller than {N}.
# building
{N} wanted to see what was on the other side of the water.
/ {N} dreamed of crossing the wide river.
{time}, {he} began to build a boat out of old wood.
/ {time}, {he} started to build a small bridge.
It was hard work, and {he} soon grew tired.
/ The wood was heavy, and it broke again and again.
{M} the {friend} brought a hammer and a box of nails.
/ Then {a_friend} named {M} came to help.
They worked side by side until the sun went down.
/ Together they finished the work in three days.
On the other side they found a field full of flowers.
/ When they reached the other side, they danced with joy.
# a new friend
{N} often played alone and wished for a friend.
/ {N} was sometimes lonely, for nobody lived nearby.
{time}, {a_friend} named {M} moved into the house next door.
/ {time}, {he} met {a_friend} named {M}.
At first both were too shy to speak.
/ {M} hid behind a bush and said nothing.
Then {N} held out {his} {thing} and asked, "Would you like to play?"
/ So {N} put down {his} {thing} and said, "You may have a turn."
{M} smiled and nodded.
/ {M} laughed, and all at once it was easy.
They played all afternoon and made plans for the next day.
/ They played together until the stars came out.
""")

ENDINGS = (
    "From then on, {N} and {M} were the best of friends.",
    "And {N} went home happy.",
    "And so {N} learned that a good friend makes everything easier.",
    "{N} slept well that night.",
    "And they lived happily ever after.",
)

SYLLABLES = "ba do fi ga ki lo mu na pi ro su ta ve zo bri cla dre flo gri sto".split()


@dataclass(frozen=True)
class Story:
    """One story and the words that a request for it may name."""

    text: str
    kind: str
    name: str
    friend: str
    friend_name: str
    thing: str | None


def keeps_to(text: str, kind: str) -> bool:
    """Whether a told story opens with the kind of hero that was asked for and has a cast of at most two known names."""
    cast = {name for name in (*SHE, *HE) if re.search(rf"\b{name}\b", text)}
    return re.search(rf"\b{kind}\b", text.split(".")[0]) is not None and len(cast) <= 2


def article(noun: str) -> str:
    """Return ``noun`` with "a" or "an" before it."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def tell(rng: random.Random) -> Story:
    """Tell one story; every choice is drawn from ``rng``."""
    kind, friend = (_invented(rng) if rng.random() < 0.06 else rng.choice(KINDS) for _ in range(2))
    name, he, him, his = _person(rng, kind)
    friend_name, fhe, fhim, _ = _person(rng, friend, other_than=name)
    place, place2 = rng.sample(PLACES, 2)
    thing = rng.choice(THINGS)
    words = {
        "N": name, "he": he, "him": him, "his": his, "He": he.capitalize(), "place": place, "place2": place2,
        "M": friend_name, "friend": friend, "fhe": fhe, "fhim": fhim, "a_friend": article(friend),
        "a_friend_cap": article(friend).capitalize(), "a_hero": article(f"{rng.choice(TRAITS)} {kind}"),
        "thing": thing, "a_thing": article(thing), "time": rng.choice(TIMES), "food": rng.choice(FOODS),
    }  # fmt: skip
    sentences = [rng.choice(wordings) for wordings in (OPENINGS, *rng.choice(PLOTS), ENDINGS)]
    used = "".join(sentences)
    return Story(
        text=" ".join(sentences).format(**words),
        kind=kind,
        name=name,
        friend=friend,
        friend_name=friend_name,
        thing=thing if "thing}" in used else None,
    )


def _person(rng: random.Random, kind: str, other_than: str = "") -> tuple[str, str, str, str]:
    """Return a name and its pronouns (he, him, his)."""
    female = GENDERED.get(kind, rng.choice(("she", "he"))) == "she"
    name = _invented(rng).capitalize() if rng.random() < 0.1 else rng.choice(SHE if female else HE)
    if name == other_than:
        return _person(rng, kind, other_than)
    return (name, "she", "her", "her") if female else (name, "he", "him", "his")


def _invented(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))
