"""A skill of the study problems: how a scene is sampled, asked about and drawn. The skills are in `study_*.py`.

A scene is a tuple of values. The scene and a random generator determine the texts and pictures of a problem.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, NamedTuple

from mmcot.problems.drawing import COLORS, Canvas

SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Level:
    """
    The settings of one difficulty.

    Args:
        num_objects: objects in a picture, or persons in a text; pictures of Sort-of-CLEVR always have six.
        num_blots: blots of ink on each picture, which may hide the detail that the question asks for.
        num_attributes: facts about each animal in the corpus.
        num_training_problems: problems of all families in the training split.
    """

    num_objects: int
    num_blots: int
    num_attributes: int
    num_training_problems: int


@dataclass(frozen=True)
class Wording:
    """
    The texts of one problem. `answer` is the right choice; `others` are the wrong choices in any order.

    Args:
        observation: the details of the scene that the question needs.
        reasoning: the sentences between the observation and the conclusion.
        conclusion: the last sentence of the solution, after "So,".
        lecture: replaces the lecture of the skill.
    """

    question: str
    answer: str
    others: Sequence[str]
    observation: str
    conclusion: str
    reasoning: str = ""
    context: str = ""
    lecture: str = ""
    gold_passages: tuple[str, ...] = ()

    @property
    def solution(self) -> str:
        return " ".join(filter(None, [self.observation, self.reasoning, f"So, {self.conclusion}"]))


@dataclass(frozen=True)
class Skill:
    """
    One kind of problem.

    Args:
        share: percentage of all study problems, in every split.
        mistake: the kind of mistake (`evaluation.mistakes`) that is expected if a problem is answered wrongly.
        sample: returns a random scene.
        combination: returns the values of a scene that determine its split; no other split has this combination.
        ask: returns the questions about a scene.
        draw: returns the pictures of a scene.
        named: returns the names of everything that a scene shows.
        vocabulary: the names of everything that any scene may show; empty without pictures.
        caption: returns a short description of a scene that does not depend on the question; none without pictures.
        scenes: a name that skills share to ask about the same scenes; if empty, the skill has its own scenes.
        per_scene: the number of questions that `ask` returns; training uses only the first one.
    """

    subject: str
    grade: str
    category: str
    share: int
    mistake: str
    lecture: str
    sample: Callable[[Random, Level], Any]
    combination: Callable[[Any], tuple]
    ask: Callable[[Random, Any], list[Wording]]
    draw: Callable[[Any], list[Canvas]] | None = None
    named: Callable[[Any], set[str]] = lambda scene: set()
    vocabulary: frozenset[str] = frozenset()
    caption: Callable[[Any], str] = lambda scene: ""
    scenes: str = ""
    per_scene: int = 1


class Thing(NamedTuple):
    """A colored shape."""

    color: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def names_of(things: Iterable[Thing]) -> set[str]:
    """Return the colors, the shapes and the full names of things."""
    return {name for thing in things for name in (*thing, thing.name)}


THINGS = [Thing(color, shape) for color, shape in product(COLORS, SHAPES)]
THING_NAMES = frozenset(names_of(THINGS))


def sample_things(rng: Random, number: int) -> list[Thing]:
    """Return things of different colors."""
    return [Thing(color, rng.choice(SHAPES)) for color in rng.sample(list(COLORS), number)]


def draw_thing(canvas: Canvas, thing: Thing, center: tuple, radius: float) -> None:
    canvas.shape(thing.shape, center, radius, COLORS[thing.color])


def name_things(things: Iterable[Thing]) -> str:
    """Return the names of things in alphabetical order, so that the text does not tell their places."""
    return listed(sorted(f"a {thing.name}" for thing in things))


def listed(texts: Sequence[str]) -> str:
    """Join texts like "a, b and c"."""
    return f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else texts[0]


def jitter(rng: Random, number: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return random offsets in px, one for each of `number` objects."""
    return tuple((rng.randint(-most, most), rng.randint(-most, most)) for _ in range(number))
