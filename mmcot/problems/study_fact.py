"""Facts about invented animals, which a corpus of passages states. The picture shows the name of the animal.

A name has two words, and the picture has a sign for each: the left sign is the first word, the right sign the second.
Every sign occurs in training. The skill `fact/common` asks about the eight animals of `COMMON` in every split, so that
a model can memorize their facts. The skill `fact/rare` asks about the other animals, and no animal of its val and test
problems occurs in training: a model can learn to read the names of these animals, but without the passages every system
is at chance.

The corpus has one passage for each attribute of each animal of all splits. It contains no question and no list of
choices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

from mmcot.problems.drawing import LINE, SIZE, Canvas
from mmcot.problems.study_skill import THINGS, Level, Skill, Thing, Wording, draw_thing, jitter, name_things

# One word for each sign (`THINGS`), in this order.
FIRST_WORDS = (
    "Velor Tamin Brusk Kelto Pondar Sirra Nolve Gartis Hompe Luvin Ristel Dakro Fumil Zentar Morip Calbe Wistan Jurso"
).split()
SECOND_WORDS = (
    "alvun corin dulet eltar fosk grimo hulto iskan joret kivel lomar mintu norba otrel pirso quend rusti stovin"
).split()
# The animals that training problems often ask about.
COMMON = tuple(zip(Random("first signs").sample(THINGS, 8), Random("second signs").sample(THINGS, 8), strict=True))
RADIUS = 14  # of a sign, px


@dataclass(frozen=True)
class Attribute:
    """An attribute of animals: the question about it, the verb of its passages, and its possible values."""

    question: str
    verb: str
    values: tuple[str, ...]


ATTRIBUTES = {
    "home": Attribute(
        "Where does this animal live?",
        "lives",
        ("in the marsh", "in the forest", "on the cliffs", "in the desert", "on the beach", "in caves", "in the river",
         "in the hills"),
    ),
    "food": Attribute(
        "What does this animal eat?", "eats", ("nuts", "reeds", "snails", "moss", "seeds", "berries", "ants", "crabs")
    ),
    "size": Attribute(
        "How large does this animal grow?",
        "grows",
        ("as large as a mouse", "as large as a hen", "as large as a cat", "as large as a fox", "as large as a goat",
         "as large as a pony", "as large as a cow", "as large as a bus"),
    ),
    "sleep": Attribute(
        "When does this animal sleep?",
        "sleeps",
        ("at noon", "at night", "at dawn", "at dusk", "in winter", "in summer", "in spring", "in autumn"),
    ),
    "fear": Attribute(
        "What does this animal fear?", "fears", ("fire", "thunder", "snow", "wind", "owls", "bees", "wolves", "smoke")
    ),
    "travel": Attribute(
        "How does this animal travel?",
        "travels",
        ("alone", "in pairs", "in threes", "in herds", "in lines", "in rings", "with birds", "with deer"),
    ),
    "nest": Attribute(
        "What does this animal build its nest of?",
        "builds its nest of",
        ("mud", "twigs", "straw", "leaves", "wool", "shells", "bark", "feathers"),
    ),
    "young": Attribute(
        "How many young does this animal raise?",
        "raises",
        ("one young", "two young", "three young", "four young", "five young", "six young", "seven young",
         "eight young"),
    ),
    "coat": Attribute(
        "What covers this animal?",
        "wears",
        ("gray fur", "brown fur", "thick scales", "thin scales", "long hair", "short hair", "sharp spines",
         "smooth skin"),
    ),
    "call": Attribute(
        "How does this animal call?",
        "calls",
        ("with a whistle", "with a hum", "with a bark", "with a click", "with a roar", "with a chirp", "with a growl",
         "with a sigh"),
    ),
    "drink": Attribute(
        "What does this animal drink?",
        "drinks",
        ("dew", "rain", "sap", "nectar", "milk", "sea water", "juice", "spring water"),
    ),
    "age": Attribute(
        "How old does this animal become?",
        "becomes",
        ("ten years old", "twenty years old", "thirty years old", "forty years old", "fifty years old",
         "sixty years old", "seventy years old", "eighty years old"),
    ),
}  # fmt: skip


class Passage(NamedTuple):
    """A passage of the corpus."""

    id: str
    title: str
    text: str
    source: str


class Scene(NamedTuple):
    """The two signs of an animal's name, their offsets in px, and the attribute of the question."""

    signs: tuple[Thing, Thing]
    offsets: tuple
    attribute: str


def corpus(level: Level) -> list[Passage]:
    """Return a passage for each animal and each attribute of a level."""
    attributes = list(ATTRIBUTES)[: level.num_attributes]
    return [passage(signs, attribute) for signs in product(THINGS, THINGS) for attribute in attributes]


def passage(signs: tuple[Thing, Thing], attribute: str) -> Passage:
    name = name_of(signs)
    return Passage(
        id=f"{name.replace(' ', '-')}-{attribute}".lower(),
        title=f"{name}: {attribute}",
        text=fact(signs, attribute),
        source="Animals of the study problems",
    )


def name_of(signs: tuple[Thing, Thing]) -> str:
    first, second = (THINGS.index(sign) for sign in signs)
    return f"{FIRST_WORDS[first]} {SECOND_WORDS[second]}"


def fact(signs: tuple[Thing, Thing], attribute: str) -> str:
    """Return the sentence that states an attribute of an animal."""
    return f"The {name_of(signs)} {ATTRIBUTES[attribute].verb} {value_of(signs, attribute)}."


@cache
def value_of(signs: tuple[Thing, Thing], attribute: str) -> str:
    """
    Return the value of an animal's attribute. It is random, and no other value predicts it. Each common animal has
    another value of the attribute, so that no value is more frequent.
    """
    values = ATTRIBUTES[attribute].values
    if signs in COMMON:
        return Random(f"common {attribute}").sample(values, len(COMMON))[COMMON.index(signs)]
    return Random(f"fact {name_of(signs)} {attribute}").choice(values)


def sample_common(rng: Random, level: Level) -> Scene:
    return sample(rng, level, rng.choice(COMMON))


def sample_rare(rng: Random, level: Level) -> Scene:
    while (signs := (rng.choice(THINGS), rng.choice(THINGS))) in COMMON:
        pass
    return sample(rng, level, signs)


def sample(rng: Random, level: Level, signs: tuple[Thing, Thing]) -> Scene:
    return Scene(signs, jitter(rng, 2, most=4), rng.choice(list(ATTRIBUTES)[: level.num_attributes]))


def ask(rng: Random, scene: Scene) -> list[Wording]:
    attribute, answer = ATTRIBUTES[scene.attribute], value_of(scene.signs, scene.attribute)
    wording = Wording(
        question=attribute.question,
        answer=answer,
        others=rng.sample([value for value in attribute.values if value != answer], 3),
        observation=f"The animal is the {name_of(scene.signs)}.",
        reasoning=fact(scene.signs, scene.attribute),
        conclusion=f"the answer is {answer}.",
        lecture=fact(scene.signs, scene.attribute),
        gold_passages=(passage(scene.signs, scene.attribute).id,),
    )
    return [wording]


def draw(scene: Scene) -> list[Canvas]:
    canvas = Canvas()
    canvas.rectangle((2, 22, SIZE - 2, SIZE - 22), fill="white", outline=LINE, radius=6)
    for left, sign, (dx, dy) in zip((0, SIZE // 2), scene.signs, scene.offsets, strict=True):
        draw_thing(canvas, sign, (left + SIZE // 4 + dx, SIZE // 2 + dy), RADIUS)
    canvas.line((SIZE // 2, 22), (SIZE // 2, SIZE - 22), LINE)
    return [canvas]


def named(signs: tuple[Thing, Thing]) -> set[str]:
    name = name_of(signs)
    return {name, *name.split()}


def fact_skill(category: str, sample: Callable[[Random, Level], Scene], combination: Callable[[Scene], tuple]) -> Skill:
    return Skill(
        subject="natural science",
        grade="grade6",
        category=category,
        share=10,
        mistake="factual",
        lecture="",  # each problem has its own: the fact
        sample=sample,
        combination=combination,
        ask=ask,
        draw=draw,
        named=lambda scene: named(scene.signs),
        vocabulary=frozenset(name for signs in product(THINGS, THINGS) for name in named(signs)),
        caption=lambda scene: f"A sign with {name_things(scene.signs)}.",
    )


SKILLS = {
    "fact/common": fact_skill("Common animals", sample_common, lambda scene: scene[:2]),
    "fact/rare": fact_skill("Rare animals", sample_rare, lambda scene: scene.signs),
}
